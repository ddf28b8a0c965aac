"""Pages that the site makes from the package: one for each method."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from hf_visual_peft import list_methods
from hf_visual_peft.cli.catalogue import methods_markdown
from hf_visual_peft.core.registry import Method


CONFIGS = Path(__file__).parents[2] / "recipes" / "configs"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """List the pages of the methods after the overview, by branch of the survey."""
    branches: dict[str, list[dict[str, str]]] = {}
    for method in sorted(list_methods().values(), key=lambda method: (method.category, method.name)):
        title = method.config_cls.__name__.removesuffix("Config")
        branches.setdefault(method.category.capitalize(), []).append({title: f"methods/{method.name}.md"})
    (methods,) = (entry["Methods"] for entry in config.nav or () if "Methods" in entry)
    methods += [{branch: pages} for branch, pages in branches.items()]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Write the pages of the methods."""
    sections = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", methods_markdown(), flags=re.DOTALL | re.MULTILINE))
    for method in list_methods().values():
        name = method.config_cls.__name__
        page = File.generated(config, f"methods/{method.name}.md", content=_page(method, sections[name]))
        files.append(page)
    return files


def _page(method: Method, section: str) -> str:
    path = f"{method.config_cls.__module__}.{method.config_cls.__name__}"
    text = f"# {method.config_cls.__name__.removesuffix('Config')}\n{section}\n## Reference\n\n::: {path}\n"
    settings = CONFIGS / f"{method.name}.yaml"
    if settings.exists():
        text += f"\n## Settings of the paper\n\n`hf-visual-peft train --config {method.name}` takes these:\n\n"
        text += f"```yaml\n{settings.read_text(encoding='utf-8')}```\n"
    return text
