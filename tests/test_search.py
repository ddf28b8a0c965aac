"""Search: subnets equal ordinary adapters, evolution keeps its cap and resumes, and bad input is named."""

from __future__ import annotations

import copy
import functools
import itertools
import json
from random import Random

import pytest
import torch
from families import FAMILIES
from peft import PeftModel
from torch import nn

from hf_visual_peft import list_methods
from hf_visual_peft.search import Gene, Subnets, Supernet, evolve, read_space
from hf_visual_peft.search.subnets import weights_of
from hf_visual_peft.search.supernet import Draws


NOAH = {
    "method": "composite",
    "parts": [
        {"method": "vpt", "sizes": {"num_virtual_tokens": [1, 2, 4]}, "depths": [1, 2]},
        {"method": "sharedlora", "sizes": {"r": [0, 1, 3]}, "dropout": 0.0},
        {"method": "pfeiffer", "sizes": {"r": [1, 2, 4]}, "depths": [0, 1, 2]},
    ],
}
GLORA = {"method": "glora", "r": [1, 2]}


def supernet(space, family="vit", seed=0):
    """With random weights, so that no subnet is the identity."""
    return copy.deepcopy(_supernet(json.dumps(space), family, seed))


@functools.lru_cache
def _supernet(text, family, seed):
    space = read_space(json.loads(text))
    made = Supernet(space.put_on(FAMILIES[family].model()), space, seed)
    torch.manual_seed(1)
    for parameter in made.model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    return made


@torch.no_grad()
def logits(model, family="vit"):
    return model.eval()(**FAMILIES[family].inputs(2)).logits


@pytest.mark.parametrize(
    ("space", "family"),
    [(NOAH, "vit"), (NOAH, "dinov2"), (GLORA, "vit"), ({**GLORA, "config_A_B": ["none", "vector"]}, "dinov2")],
)
def test_subnets_are_ordinary_adapters(space, family, tmp_path):
    """The same outputs from the supernet, from the extracted adapter and from its files; and the count is true."""
    outputs = []
    for number in range(4):
        made = supernet(space, family)
        choice = made.subnets.smallest() if number == 0 else made.subnets.draw(Random(number))
        made.chosen = choice
        inside = logits(made, family)
        found = made.extract(choice)
        torch.testing.assert_close(logits(found, family), inside, rtol=0, atol=1e-5)
        prefix = f".{found.base_model.prefix}"
        trained = sum(p.numel() for name, p in found.named_parameters() if p.requires_grad and prefix in name)
        assert trained == made.subnets.parameters(choice)
        outputs.append(inside)
    found.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(FAMILIES[family].model(), tmp_path)
    assert torch.equal(logits(again, family), logits(found, family))
    assert not any(torch.equal(one, other) for one, other in itertools.combinations(outputs, 2))


def test_shipped_spaces_have_the_counts_of_the_papers():
    from transformers import ViTConfig, ViTForImageClassification

    # NOAH also has positions of the first prompts; GLoRA's queries, keys and values are one linear
    for name, count in (("noah", 6_538_416 - 76_800), ("glora", 1_603_776 + 221_280)):
        space = read_space(name)
        with torch.device("meta"):
            model = space.put_on(ViTForImageClassification(ViTConfig()))
        assert sum(parameter.numel() for parameter in weights_of(model).values()) == count


def test_a_step_trains_the_drawn_part_alone():
    made = supernet(NOAH)
    made.train()
    inputs = FAMILIES["vit"].inputs(2)
    made(**inputs, labels=torch.tensor([0, 1])).loss.backward()
    choice = Draws(0).next(made.subnets.draw)
    weights = {name: torch.zeros_like(p, requires_grad=True) for name, p in made._weights.items()}
    for tensor in made.subnets.tensors(choice, weights).values():
        tensor.sum().backward()
    for name, parameter in made._weights.items():
        inside = weights[name].grad
        if inside is None:
            assert parameter.grad is None
        else:
            assert torch.equal(parameter.grad != 0, (parameter.grad != 0) & (inside != 0))
            assert parameter.grad.abs().sum() > 0
    assert any(p.grad is not None for name, p in made.model.named_parameters() if "modules_to_save" in name)


def test_draws_continue_from_their_state():
    draw = Weighted().draw
    one, other, third = Draws(0), Draws(0), Draws(1)
    drawn = [one.next(draw) for _ in range(6)]
    other.load_state_dict({"count": 3})
    assert [other.next(draw) for _ in range(3)] == drawn[3:]
    assert one.state_dict() == other.state_dict()
    assert len(set(drawn)) > 1
    assert drawn != [third.next(draw) for _ in range(6)]


class Weighted(Subnets):
    """Numbers in place of a model: six genes, of which the first two have no effect while the third is 0."""

    def __init__(self):
        super().__init__([Gene(str(i), (0, 1, 2, 3), 0.3) for i in range(6)])

    def canonical(self, choice):
        return choice if choice[2] else (0, 0, *choice[2:])

    def parameters(self, choice):
        return sum((index + 1) * option for index, option in enumerate(choice))

    def smallest(self):
        return (0, 0, 1, 0, 0, 0)

    def config(self, choice): ...
    def tensors(self, choice, weights): ...
    def own_weights(self, choice, weights, model): ...
    def describe(self, choice): ...


SMALL = {"population": 8, "parents": 3, "mutations": 4, "crossovers": 4, "generations": 5, "progress": False}


def fitness(choice):
    return -sum((option - best) ** 2 for option, best in zip(choice, (3, 1, 2, 0, 3, 1), strict=True))


def test_evolution_keeps_the_cap_and_finds_what_is_best():
    subnets, seen = Weighted(), []

    def measured(choice):
        seen.append(choice)
        return fitness(choice)

    found = evolve(subnets, measured, max_parameters=20, **SMALL)
    assert len(seen) == len(set(seen)) == found.evaluated  # nothing twice
    assert all(0 < subnets.parameters(choice) <= 20 and choice == subnets.canonical(choice) for choice in seen)
    assert found.fitness == max(map(fitness, seen)) == found.history[-1] > found.history[0]
    assert len(found.history) == 6
    larger = evolve(subnets, fitness, max_parameters=60, **{**SMALL, "generations": 30})
    assert larger.fitness == 0


def test_equal_subnets_the_smaller_one():
    found = evolve(Weighted(), lambda choice: 1.0, max_parameters=30, **SMALL)
    assert found.parameters == min(
        found.parameters, evolve(Weighted(), lambda choice: 1.0, max_parameters=30, **SMALL, seed=0).parameters
    )
    assert evolve(Weighted(), lambda choice: 1.0, max_parameters=3, **SMALL).choice == Weighted().smallest()


def test_evolution_depends_on_the_seed_alone():
    one, same, other = (evolve(Weighted(), fitness, max_parameters=25, seed=s, **SMALL) for s in (0, 0, 1))
    assert one == same
    assert one.history != other.history or one.choice != other.choice


@pytest.mark.parametrize("killed_at", [1, 7, 23])
def test_a_killed_search_gives_what_it_would_have_given(tmp_path, killed_at):
    record = tmp_path / "search.json"
    whole, whole_calls = [], []

    def counted(calls, limit=None):
        def measured(choice):
            if limit is not None and len(calls) == limit:
                raise KeyboardInterrupt
            calls.append(choice)
            return fitness(choice)

        return measured

    whole = evolve(Weighted(), counted(whole_calls), max_parameters=25, **SMALL)
    before, after = [], []
    with pytest.raises(KeyboardInterrupt):
        evolve(Weighted(), counted(before, killed_at), max_parameters=25, record=record, **SMALL)
    assert evolve(Weighted(), counted(after), max_parameters=25, record=record, **SMALL) == whole
    assert before + after == whole_calls  # nothing again
    assert [path.name for path in tmp_path.iterdir()] == ["search.json"]
    assert evolve(Weighted(), counted([], 0), max_parameters=25, record=record, **SMALL) == whole


def test_a_record_of_another_search_is_refused(tmp_path):
    record = tmp_path / "search.json"
    evolve(Weighted(), fitness, max_parameters=25, record=record, **SMALL)
    before = record.read_text()
    with pytest.raises(ValueError, match=r"max_parameters 25 \(now 24\).*Delete it"):
        evolve(Weighted(), fitness, max_parameters=24, record=record, **SMALL)
    other = Weighted()
    other.genes = other.genes[:-1]
    with pytest.raises(ValueError, match="another space or model"):
        evolve(other, fitness, max_parameters=25, record=record, **SMALL)
    assert record.read_text() == before
    record.write_text(before[:50])
    with pytest.raises(ValueError, match="damaged"):
        evolve(Weighted(), fitness, max_parameters=25, record=record, **SMALL)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"max_parameters": 2}, "max_parameters is 2: the smallest subnet of the space has 3 parameters"),
        ({"max_parameters": 2.5}, "max_parameters is 2.5: must be an integer"),
        ({"population": 0}, "population is 0: must be an integer of at least 1"),
        ({"parents": 9}, "parents is 9: must be at most population, 8"),
        ({"mutations": 0, "crossovers": 0}, "both 0"),
        ({"generations": -1}, "generations is -1"),
        ({"seed": True}, "seed is True"),
    ],
)
def test_arguments_of_evolution_are_named(changed, message):
    with pytest.raises(ValueError, match=message):
        evolve(Weighted(), fitness, **{"max_parameters": 25, **SMALL, **changed})


def test_a_fitness_that_is_not_finite_is_not_recorded(tmp_path):
    with pytest.raises(ValueError, match="fitness of a subnet is nan"):
        evolve(Weighted(), lambda choice: float("nan"), max_parameters=25, record=tmp_path / "r.json", **SMALL)
    assert not (tmp_path / "r.json").exists()


def part(**changed):
    return {"method": "composite", "parts": [{"method": "vpt", "sizes": {"num_virtual_tokens": [1, 2]}, **changed}]}


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ("naoh", "'naoh': there is no such file, and the names of this package are noah, glora"),
        ([1], "is a mapping with a method, not list"),
        ({"parts": []}, "method is None: must be one of composite, glora"),
        ({"method": "composite"}, "parts is None"),
        ({"method": "composite", "part": []}, "unknown key part. Known are method, parts"),
        (part(method="nothing"), "no method 'nothing'"),
        (part(dephts=[1]), "dephts"),
        (part(method="gps", sizes={"k": [1, 2]}), "GPSConfig cannot be a part: it chooses from data"),
        (part(method="dyt", sizes={"r": [1, 2]}), "DyTConfig cannot be a part: its loss needs a second pass"),
        (part(method="lora", sizes={"r": [1, 2]}), "lora: LoRA's factor is lora_alpha / r.*sharedlora"),
        (part(sizes=[1, 2]), "must name one field and its options"),
        (part(sizes={"num_virtual_tokens": [2, 1]}), "must be a list of integers from 0, ascending"),
        (part(sizes={"num_virtual_tokens": [0]}), "a size above 0"),
        (part(sizes={"num_virtual_tokens": [1, 20_000]}), "VPTConfig.num_virtual_tokens is 20000"),
        (part(sizes={"tokens": [1]}), "tokens"),
        (part(depths=[0]), "a depth above 0"),
        (part(depths="all"), "must be a list of integers"),
        (part(layers_to_transform=[0]), "layers_to_transform is searched"),
        (part(num_virtual_tokens=3), "num_virtual_tokens is searched"),
        ({**GLORA, "r": [0, 1]}, "r is .* from 1, ascending"),
        ({**GLORA, "config_A": ["lora"]}, "unknown key config_A"),
        ({**GLORA, "config_C": ["constant"]}, "config_C is .* some of none, vector, lora"),
        ({**GLORA, "config_A_B": ["none"], "config_C": ["none"], "config_D_E": ["none"]}, "nothing trains"),
        ({**GLORA, "roles": ["qkv"]}, "roles is .* some of query"),
    ],
)
def test_what_is_wrong_with_a_space_is_named(space, message):
    with pytest.raises(ValueError, match=message):
        read_space(space)


def test_yaml_that_is_not_valid_is_named(tmp_path):
    (tmp_path / "space.yaml").write_text("method: [")
    with pytest.raises(ValueError, match="not valid YAML"):
        read_space(tmp_path / "space.yaml")


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (part(depths=[1, 30]), "part vpt: depths goes up to 30, but ViTForImageClassification has 3 blocks"),
        (part(deep=False), "depend on which other blocks have it"),
        (part(biases=True), "outside of the blocks"),
        (part(method="fact", sizes={"r": [1, 2]}), "part fact: its blocks share weights"),
        (part(method="lst", sizes={"r": [2, 4]}), "are not parts of those with r=4"),
    ],
)
def test_spaces_whose_subnets_are_no_parts_are_refused(space, message):
    with pytest.raises(ValueError, match=message):
        supernet(space)


@pytest.mark.parametrize(("method", "size"), [("mona", "r"), ("bilora", "r"), ("vfpt", "num_virtual_tokens")])
def test_sizes_that_are_more_than_parts_are_refused_before_a_step(method, size):
    made = supernet(part(method=method, sizes={size: [2, 4]}))
    before = copy.deepcopy(made.model.state_dict())
    with pytest.raises(ValueError, match=f"cannot share weights.*'{method}'"):
        made.train()(**FAMILIES["vit"].inputs(2))
    after = made.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert made.training
    assert made.draws.count == 0


def test_most_methods_with_a_rank_can_be_searched():
    for method in ("adaptformer", "convpass", "hydra", "prefix"):
        assert method in list_methods()
        size = "num_virtual_tokens" if method == "prefix" else "r"
        supernet(part(method=method, sizes={size: [2, 4]}, depths=[2])).verify(**FAMILIES["vit"].inputs(1))


def test_what_the_supernet_cannot_do_is_named():
    made = supernet(NOAH)
    with pytest.raises(TypeError, match=r"space\.put_on"):
        Supernet(FAMILIES["vit"].model(), made.space)
    made.model.add_adapter("other", made.space.supernet(made.model.get_base_model()))
    with pytest.raises(ValueError, match="the adapters default, other"):
        Supernet(made.model, made.space)
    made = supernet(NOAH)
    made.model.get_base_model().gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="gradient_checkpointing_disable"):
        made.train()(**FAMILIES["vit"].inputs(2))


def test_validation_without_images_or_labels_is_named():
    made = supernet(NOAH)
    with pytest.raises(ValueError, match="no validation images"):
        evolve(made.subnets, made.accuracy_on([]), max_parameters=10_000, **SMALL)
    with pytest.raises(ValueError, match="no labels"):
        evolve(made.subnets, made.accuracy_on([FAMILIES["vit"].inputs(2)]), max_parameters=10_000, **SMALL)


def test_search_on_a_model():
    """Train, search and extract: the adapter has the accuracy that the search saw."""
    made = supernet(NOAH)
    torch.manual_seed(0)
    batch = {**FAMILIES["vit"].inputs(8), "labels": torch.arange(8) % 3}
    optimizer = torch.optim.AdamW([p for p in made.parameters() if p.requires_grad], lr=1e-3)
    made.train()
    for _ in range(3):
        made(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    found = evolve(made.subnets, made.accuracy_on([batch]), max_parameters=400, **{**SMALL, "generations": 1})
    assert found.parameters <= 400
    model = made.extract(found.choice).eval()
    with torch.no_grad():
        right = model(pixel_values=batch["pixel_values"]).logits.argmax(-1) == batch["labels"]
    assert right.float().mean().item() == pytest.approx(found.fitness)
