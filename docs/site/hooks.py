"""Pages that the site makes from the package: one for each method, with its equation and a picture."""

import re
from pathlib import Path

import yaml
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from pictures import picture

from hf_visual_peft import list_methods
from hf_visual_peft.backbones.backbone import VisionBackbone
from hf_visual_peft.cli.catalogue import methods_markdown, vit_b16
from hf_visual_peft.core.registry import Method


CONFIGS = Path(__file__).parents[2] / "recipes" / "configs"
EQUATIONS = Path(__file__).with_name("equations.yaml")


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
    equations = yaml.safe_load(EQUATIONS.read_text(encoding="utf-8"))
    if missing := sorted(set(list_methods()) ^ set(equations)):
        raise PluginError(f"{EQUATIONS.name} and the registered methods differ by {', '.join(missing)}.")
    backbone = vit_b16()
    for name, method in list_methods().items():
        section = sections[method.config_cls.__name__]
        page = _page(method, section, equations[name], backbone)
        files.append(File.generated(config, f"methods/{name}.md", content=page))
    return files


def _page(method: Method, section: str, equations: list[str], backbone: VisionBackbone) -> str:
    path = f"{method.config_cls.__module__}.{method.config_cls.__name__}"
    summary = f"{method.summary[0].upper()}{method.summary[1:]}."
    lines = "\n".join(f"<p>{convert(line, display='block')}</p>" for line in equations)
    drawn = picture(method.config_cls().placements(backbone), backbone)
    section = re.sub(r"^- Equation: .*\n", "", section, flags=re.MULTILINE)
    text = (
        f"# {method.config_cls.__name__.removesuffix('Config')}\n\n{summary}\n\n"
        f'<div class="equation">\n{lines}\n</div>\n\n'
        f'<div class="places">{drawn}</div>\n\n{section}\n## Reference\n\n::: {path}\n'
    )
    settings = CONFIGS / f"{method.name}.yaml"
    if settings.exists():
        text += f"\n## Settings of the paper\n\n`hf-visual-peft train --config {method.name}` takes these:\n\n"
        text += f"```yaml\n{settings.read_text(encoding='utf-8')}```\n"
    return text
