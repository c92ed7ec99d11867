"""What a policy of one's own takes: a class and a decorator; functions as policies; files; how modules may import."""

from __future__ import annotations

import ast
import json
import math
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import attnrb
import pytest
import torch

pytest.importorskip("transformers")

from attnrb import Compose, Custom, Edit, Emphasis, LearnedGains, Policy, Rebalance, SinkDamping, Span, Spans
from attnrb.policies import LayerPlan, LayerView, ModelShape, Plain, Request, Session, policy_names, register_policy
from attnrb.policies.base import short_text
from edit_oracle import attached, biased
from test_patch_models import assert_close
from tiny_evaluation import save_data, save_roomy_model
from tiny_models import tiny, tokens
from torch import Tensor

PACKAGE = Path(attnrb.__file__).parent


@register_policy
@dataclass(frozen=True)
class ToyFirstKey(Policy):
    """A policy as a user would write it: multiplies the weight of the first key."""

    name: ClassVar[str] = "toy_first_key"
    version: ClassVar[int] = 2

    factor: float = 3.0

    def resolve(self, shape: ModelShape) -> LayerPlan:
        return ToyPlan(self, shape)


class ToyPlan(LayerPlan):
    def __init__(self, policy: ToyFirstKey, shape: ModelShape) -> None:
        super().__init__(shape, edited=frozenset(range(shape.layers)))
        self.bias = torch.full((1, 1, 1), math.log(policy.factor))

    def begin(self, request: Request | None = None) -> Session:
        return ToySession(self)


class ToySession(Session):
    def __init__(self, plan: ToyPlan) -> None:
        self.plan = plan

    def edit(self, view: LayerView) -> Edit:
        return Edit(key_bias=self.plan.bias.to(view.device))


def logits(model: Any, policy: Policy | Mapping[str, Any], spans: Spans | None = None) -> Tensor:
    with torch.no_grad(), attnrb.patch(model, policy) as patched, patched.spans(spans or Spans(((),))):
        found: Tensor = model(tokens(1, 12)).logits
    return found


def first_key(factor: float = 3.0) -> Tensor:
    return torch.full((1, 1, 1), math.log(factor))


def by_oracle(model: Any, bias: Tensor, first: Tensor | None = None) -> Tensor:
    with torch.no_grad(), attached(model, biased(bias, first)):
        found: Tensor = model(tokens(1, 12)).logits
    return found


def test_a_policy_is_a_class_and_a_decorator(tmp_path: Path) -> None:
    model = tiny("llama")
    assert "toy_first_key" in policy_names()
    assert_close(logits(model, ToyFirstKey()), by_oracle(model, first_key()))
    assert_close(logits(model, {"policy": "toy_first_key", "factor": 5}), by_oracle(model, first_key(5.0)))
    ToyFirstKey(7.0).save_pretrained(tmp_path)
    assert Policy.from_pretrained(tmp_path) == ToyFirstKey(7.0)
    assert ToyFirstKey.from_pretrained(tmp_path) == ToyFirstKey(7.0)


def test_the_command_line_evaluates_it(tmp_path: Path) -> None:
    for package in ("typer", "lm_eval"):
        pytest.importorskip(package)
    from attnrb.cli.app import app
    from typer.testing import CliRunner

    model, data, out = save_roomy_model(tmp_path / "model"), save_data(tmp_path / "data"), tmp_path / "out.json"
    where = ["eval", "-t", "piqa", "--data", str(data), "-m", str(model), "--json", str(out)]
    ran = CliRunner().invoke(app, [*where, "--policy", "toy_first_key", "--set", "factor=4"])
    assert ran.exit_code == 0, ran.output
    found = json.loads(out.read_text("utf-8"))
    assert [each["arm"] for each in found["results"]] == ["plain", "toy_first_key(factor=4)"]


@pytest.mark.parametrize(
    "policy",
    [
        Plain(),
        Rebalance(alpha=1.5, heads={2: (0, 1)}),
        Emphasis(strength=3, rows="all", heads={1: (2,)}, outside=0.5),
        Emphasis(share=0.3, layers=[1, 2]),
        SinkDamping(threshold=0.2, first_key=2.0, heads=[1]),
        LearnedGains(ModelShape(5, 4), Rebalance(alpha=0.4)),
        Compose(Emphasis(), SinkDamping(), ToyFirstKey()),
    ],
    ids=lambda policy: policy.name,
)
def test_files_have_all_options(policy: Policy, tmp_path: Path) -> None:
    written = json.loads(json.dumps(policy.to_dict()))
    assert (written["policy"], written["version"]) == (policy.name, policy.version)
    read = Policy.from_dict(written)
    assert type(read) is type(policy)
    assert read.to_dict() == policy.to_dict()
    policy.save_pretrained(tmp_path)
    assert type(policy).from_pretrained(tmp_path).to_dict() == policy.to_dict()


@pytest.mark.parametrize("version", [0, 3, "2", True, None])
def test_files_of_a_later_version_are_refused(version: Any) -> None:
    with pytest.raises(ValueError, match="this attnrb reads version 1 to 2 of the policy 'toy_first_key', got"):
        Policy.from_dict({"policy": "toy_first_key", "version": version})


def test_files_of_an_earlier_version_are_read() -> None:
    assert Policy.from_dict({"policy": "toy_first_key", "version": 1, "factor": 2.0}) == ToyFirstKey(2.0)


def test_what_is_no_policy_is_not_registered() -> None:
    with pytest.raises(TypeError, match=r"cls: expected a class derived from attnrb\.Policy"):
        register_policy(int)  # type: ignore[type-var]
    taken = type("Other", (Policy,), {"name": "emphasis"})
    with pytest.raises(ValueError, match="'emphasis' is the name of"):
        register_policy(taken)
    with pytest.raises(TypeError, match="expected an identifier"):
        register_policy(type("Nameless", (Policy,), {"name": "two words"}))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ([1, 2, 3], "1-3"),
        ([1, 3], "1+3"),
        ([3, 2], "3+2"),
        ([4], "4"),
        ([0.5, 1.0], "0.5+1"),
        (True, "true"),
        (None, "None"),
        ({"1": [0]}, '{"1": [0]}'),
    ],
)
def test_values_in_labels_are_short(value: Any, text: str) -> None:
    assert short_text(value) == text


def test_composed_biases_add_up() -> None:
    model, spans = tiny("llama"), Spans(((Span(2, 4),),))
    both = Compose(ToyFirstKey(), Emphasis(strength=4.0, rows="all"))
    bias = torch.zeros(1, 1, 4)
    bias[..., 0], bias[..., 2:] = math.log(3.0), math.log(4.0)
    assert_close(logits(model, both, spans), by_oracle(model, bias))


def test_composed_policies_that_do_not_fit_are_refused() -> None:
    model, spans = tiny("llama"), Spans(((Span(2, 4),),))
    with pytest.raises(ValueError, match="bias keys of layer 0 for different queries"):
        logits(model, Compose(ToyFirstKey(), Emphasis()), spans)
    with pytest.raises(ValueError, match="a share of attention in layer 0 cannot be joined"):
        logits(model, Compose(ToyFirstKey(), Emphasis(share=0.3)), spans)
    with pytest.raises(ValueError, match="policies: expected two or more, got 1"):
        Compose(Emphasis())
    with pytest.raises(TypeError, match="policies: expected attnrb policies, got str"):
        Compose(Emphasis(), "sinks")  # type: ignore[arg-type]


@pytest.mark.parametrize(("first", "fits"), [((300, 300), True), ((300, 301), False), ((3, None), False)])
@pytest.mark.parametrize("as_tensors", [False, True])
def test_composed_biases_are_for_the_same_queries(first: tuple[int, int | None], fits: bool, as_tensors: bool) -> None:
    model, ids = tiny("llama"), tokens(1, 8)

    def of(query: int | None) -> Custom:
        number = None if query is None else torch.tensor([query]) if as_tensors else int(str(query))
        return Custom(lambda view: Edit(key_bias=torch.full((1, 1, 4), 0.5), first_query=number), layers=(1,))

    with torch.no_grad(), attnrb.patch(model, Compose(*map(of, first))):
        if fits:
            model(ids)
            return
        with pytest.raises(ValueError, match="bias keys of layer 1 for different queries"):
            model(ids)


def test_a_function_is_a_policy() -> None:
    model = tiny("llama")
    twice = Custom(lambda view: Edit(key_bias=first_key().to(view.device)), name="first key")
    assert_close(logits(model, twice), by_oracle(model, first_key()))
    assert twice.label() == "first key"
    some = Custom(lambda view: Edit(key_bias=first_key()) if view.layer < 2 else None)
    assert_close(logits(model, some), logits(model, Custom(lambda _: Edit(key_bias=first_key()), layers=[0, 1])))


def test_a_function_sees_which_slots_queries_and_keys_have() -> None:
    """With padding on the left, over a prompt and two steps, and where a window has dropped the first keys."""
    seen: list[tuple[list[list[int]], int]] = []
    for name in ("llama", "mistral"):
        model, ids = tiny(name), tokens(1, 21)
        policy = Custom(lambda view: seen.append((view.query_slots().tolist(), view.key_slots())), layers=(1,))
        with torch.no_grad(), attnrb.patch(model, policy):
            model.generate(ids, max_new_tokens=3, min_new_tokens=3, do_sample=False)
        assert seen == [([[*range(21)]], 21), ([[21]], 22), ([[22]], 23)]
        seen.clear()


def test_a_function_sees_what_layers_found() -> None:
    """Re-balancing of one layer, written as a function."""
    model = tiny("llama")

    def third_layer(view: LayerView, found: Mapping[int, attnrb.Outliers]) -> Edit | None:
        return Edit(outliers=found[0], gain=0.7) if view.layer == 2 else None

    expected = logits(model, Rebalance(gains=[0.0, 0.0, 0.7, 0.0, 0.0], threshold=0.05))
    assert_close(logits(model, Custom(third_layer, emits={0: 0.05})), expected)


def test_a_function_is_not_for_files(tmp_path: Path) -> None:
    mine = Custom(lambda _: None, name="mine")
    for save in (mine.to_dict, lambda: mine.save_pretrained(tmp_path)):
        with pytest.raises(TypeError, match="'mine' is a function, which cannot be written to a file"):
            save()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"function": 3}, TypeError, "function: expected a function of a layer's view, got int"),
        ({"function": print, "name": 3}, TypeError, "name: expected text"),
        ({"function": print, "emits": [0]}, TypeError, "emits: expected a mapping"),
        ({"function": print, "emits": {0: 2.0}}, ValueError, "emits: expected thresholds between 0 and 1"),
        ({"function": print, "emits": {9: 0.1}}, ValueError, "emits: the model's layers are 0 to 4"),
        ({"function": print, "layers": [9]}, ValueError, "layers: the model's layers are 0 to 4"),
        ({"function": lambda _: 5}, TypeError, "to return an attnrb.Edit, an attnrb.policies.Mixture or None, got int"),
    ],
)
def test_what_is_no_such_function(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        logits(tiny("llama"), Custom(**arguments))


@pytest.mark.parametrize("keyword", ["outliers", "spans", "key_bias", "edit", "attnrb_anything"])
@pytest.mark.parametrize("name", ["llama", "stablelm"])
def test_keywords_that_nobody_reads_are_refused(name: str, keyword: str) -> None:
    model = tiny(name)
    with attnrb.patch(model, Rebalance()), pytest.raises(TypeError, match=f"{keyword}.*argument"):
        model(tokens(1, 6), **{keyword: None})


# ---------------------------------------------------------------------------------------------- who may import whom


def import_graph() -> dict[str, set[str]]:
    """Which modules of attnrb each one imports when it is imported itself."""
    files = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    graph = {}
    for name, path in files.items():
        found: set[str] = set()
        for module in imported(ast.parse(path.read_text("utf-8"))):
            # A name may be a module or something in one, and packages above it are imported too.
            known = module if module in files else module.rpartition(".")[0]
            if known in files and known != name:
                found.add(known)
        graph[name] = found
    return graph


def imported(tree: ast.Module) -> set[str]:
    """What is imported at the top of a module, except for type checkers."""
    found: set[str] = set()
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not used here"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            waiting += node.orelse
        elif isinstance(node, (ast.If, ast.Try, ast.With)):
            waiting += list(ast.iter_child_nodes(node))
    return found


def test_modules_import_in_no_circle() -> None:
    graph, done = import_graph(), set[str]()
    assert len(graph) > 80
    assert "attnrb.ops.edit" in graph["attnrb.policies.emphasis"]

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"a circle: {' → '.join((*path, module))}"
        if module not in done:
            for each in sorted(graph[module] - {"attnrb"}):  # being imported already by whoever imports its parts
                visit(each, (*path, module))
            done.add(module)

    for module in sorted(graph):
        visit(module, ())


ABOVE = {
    "ops": ("policies", "hosts", "text", "analysis", "evaluation", "studies", "cli"),
    "text": ("policies", "hosts", "analysis", "evaluation", "studies", "cli"),
    "policies": ("hosts", "analysis", "evaluation", "studies", "cli"),
    "hosts": ("analysis", "studies", "cli"),
    "analysis": ("cli",),
    "evaluation": ("cli",),
    "studies": ("cli",),
}


@pytest.mark.parametrize("layer", ABOVE)
def test_lower_layers_do_not_know_those_above(layer: str) -> None:
    wrong = [
        f"{module} imports {each}"
        for module, imports in import_graph().items()
        if module.startswith(f"attnrb.{layer}")
        for each in imports
        if each.split(".")[1:2] and each.split(".")[1] in ABOVE[layer]
    ]
    assert not wrong


@pytest.mark.slow
def test_importing_attnrb_does_not_import_transformers() -> None:
    code = "import attnrb, sys; print(sorted({'transformers', 'lm_eval', 'vllm', 'numpy.testing'} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert ran.stdout.strip() == "[]"
