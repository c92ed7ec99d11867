"""RebalanceConfig: validation, the schedule of gains, resolving for a model, dictionaries."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attnrb import Rebalance, RebalanceConfig
from attnrb.policies import ModelShape


def test_defaults_are_the_published_method() -> None:
    config = RebalanceConfig()
    assert (config.alpha, config.threshold, config.source_layer) == (0.2, 0.01, 0)
    assert not config.normalize
    assert not config.boost_all


def test_gains_fall_linearly_to_the_last_layer() -> None:
    gains = RebalanceConfig(alpha=0.3).layer_gains(layers=4, heads=2)
    assert gains[0] is None
    assert gains[1] == pytest.approx((0.2, 0.2))
    assert gains[2] == pytest.approx((0.1, 0.1))
    assert gains[3] is None, "a gain of 0 leaves the layer as it is"


def test_depth_sets_where_the_gain_is_zero() -> None:
    gains = RebalanceConfig(alpha=0.2, depth=31).layer_gains(layers=30, heads=1)
    assert [gain[0] for gain in gains[1:] if gain] == pytest.approx([0.2 * (1 - layer / 31) for layer in range(1, 30)])
    beyond = RebalanceConfig(alpha=0.2, depth=2).layer_gains(layers=5, heads=1)
    assert beyond[2] is None
    assert beyond[4] == pytest.approx((-0.2,))


def test_gains_override_alpha_and_depth() -> None:
    config = RebalanceConfig(alpha=9.0, depth=3, gains=[0.5, 0.25, 0.0, -0.125])
    assert config.layer_gains(layers=4, heads=1) == (None, (0.25,), None, (-0.125,))


def test_source_layer_and_those_before_it_stay() -> None:
    gains = RebalanceConfig(source_layer=2, gains=[1.0] * 5).layer_gains(layers=5, heads=1)
    assert gains == (None, None, None, (1.0,), (1.0,))


def test_layers_and_heads_choose() -> None:
    gains = [0.0, 0.1, 0.2, 0.3]
    assert RebalanceConfig(gains=gains, layers=[3, 0, 1]).layer_gains(4, 1) == (None, (0.1,), None, (0.3,))
    assert RebalanceConfig(gains=gains, heads=[2]).layer_gains(4, 3)[1:] == ((0, 0, 0.1), (0, 0, 0.2), (0, 0, 0.3))
    by_layer = RebalanceConfig(gains=gains, heads={1: [0], 3: [0, 2]})
    assert by_layer.layer_gains(4, 3) == (None, (0.1, 0, 0), None, (0.3, 0, 0.3))
    assert RebalanceConfig(gains=gains, layers=[2], heads={1: [0]}).layer_gains(4, 3) == (None,) * 4


def test_one_layer_has_nothing_below_it() -> None:
    assert RebalanceConfig().layer_gains(layers=1, heads=2) == (None,)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"alpha": math.nan}, ValueError, "alpha: expected a finite number, got nan"),
        ({"alpha": math.inf}, ValueError, "alpha"),
        ({"alpha": "0.2"}, TypeError, "alpha: expected a number, got '0.2'"),
        ({"alpha": True}, TypeError, "alpha"),
        ({"threshold": 0}, ValueError, "threshold: expected a number between 0 and 1, both excluded, got 0.0"),
        ({"threshold": 1.0}, ValueError, "threshold"),
        ({"threshold": -0.1}, ValueError, "threshold"),
        ({"threshold": math.nan}, ValueError, "threshold"),
        ({"source_layer": -1}, ValueError, "source_layer: expected 0 or above, got -1"),
        ({"source_layer": 1.0}, TypeError, "source_layer: expected an integer, got 1.0"),
        ({"source_layer": None}, TypeError, "source_layer"),
        ({"depth": 0}, ValueError, "depth: expected a positive number, got 0"),
        ({"depth": math.nan}, ValueError, "depth"),
        ({"normalize": 1}, TypeError, "normalize: expected True or False, got 1"),
        ({"boost_all": None}, TypeError, "boost_all"),
        ({"layers": [1, -2]}, ValueError, "layers: expected 0 or above, got -2"),
        ({"layers": 3}, TypeError, "layers: expected a sequence, got 3"),
        ({"layers": b"12"}, TypeError, "layers"),
        ({"layers": "1-x"}, ValueError, "layers: expected numbers and ranges like 1-12,15, got '1-x'"),
        ({"layers": []}, ValueError, "layers: expected at least one"),
        ({"layers": [0]}, ValueError, "layers: expected at least one above the source layer 0"),
        ({"layers": [True]}, TypeError, "layers"),
        ({"heads": [-1]}, ValueError, "heads"),
        ({"heads": [0.5]}, TypeError, "heads"),
        ({"heads": {1: [-1]}}, ValueError, r"heads\[1\]"),
        ({"heads": {1: 2}}, TypeError, r"heads\[1\]: expected a sequence"),
        ({"heads": {"one": [1]}}, TypeError, "heads: expected an integer, got 'one'"),
        ({"heads": {0: [1]}}, ValueError, "heads: expected a layer above the source layer 0"),
        ({"gains": [0.1, math.nan]}, ValueError, "gains: expected a finite number, got nan"),
        ({"gains": 0.1}, TypeError, "gains: expected a sequence, got 0.1"),
        ({"gains": [[0.1]]}, TypeError, "gains"),
    ],
)
def test_bad_options_are_refused_by_name(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        RebalanceConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source_layer": 6}, "source_layer: the model's layers are 0 to 5, got 6"),
        ({"layers": [2, 6, 9]}, r"layers: the model's layers are 0 to 5, got 6,9"),
        ({"heads": [4]}, r"heads: the model's heads are 0 to 3, got 4"),
        ({"heads": {6: [0]}}, r"heads: the model's layers are 0 to 5, got 6"),
        ({"heads": {1: [0, 4]}}, r"heads: the model's heads are 0 to 3, got 4"),
        ({"gains": [0.1] * 5}, "gains: expected one for each of the model's 6 layers, got 5"),
    ],
)
def test_options_beyond_the_model_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RebalanceConfig(**options).layer_gains(layers=6, heads=4)


def test_numbers_of_other_libraries_are_taken() -> None:
    config = RebalanceConfig(
        alpha=np.float32(0.5),
        source_layer=np.int64(1),
        layers=torch.tensor([3, 2]),
        gains=np.array([0.0, 0.5, 1.0, 1.5]),
    )
    assert config == RebalanceConfig(alpha=0.5, source_layer=1, layers=[2, 3], gains=[0.0, 0.5, 1.0, 1.5])
    assert all(type(layer) is int for layer in config.layers or ())


def test_frozen_and_detached_from_what_it_was_made_of() -> None:
    layers, heads = [1, 2], {1: [0]}
    config = RebalanceConfig(layers=layers, heads=heads)
    layers.append(3)
    heads[2] = [1]
    assert (config.layers, config.heads) == ((1, 2), {1: (0,)})
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.alpha = 0.3  # type: ignore[misc]
    assert hash(config) == hash(RebalanceConfig(layers=[1, 2], heads={1: [0]}))


@pytest.mark.parametrize(
    "config",
    [
        RebalanceConfig(),
        RebalanceConfig(alpha=-0.1, threshold=0.05, source_layer=1, depth=31, normalize=True, layers=range(2, 9)),
        RebalanceConfig(boost_all=True, heads={1: [0, 2], 4: [1]}, gains=[0.0, 0.5]),
        RebalanceConfig(heads=[0, 1]),
    ],
)
def test_dictionaries_survive_json(config: RebalanceConfig) -> None:
    assert RebalanceConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_dictionaries_are_checked() -> None:
    assert RebalanceConfig.from_dict({"alpha": 0.5}) == RebalanceConfig(alpha=0.5)
    with pytest.raises(ValueError, match="unknown 'apha'; known are alpha, "):
        RebalanceConfig.from_dict({"apha": 0.5})
    with pytest.raises(TypeError, match="options: expected a mapping, got list"):
        RebalanceConfig.from_dict([("alpha", 0.5)])  # type: ignore[arg-type]


def test_saved_in_a_model_folder_and_found_again(tmp_path: Path) -> None:
    config = RebalanceConfig(alpha=0.3, source_layer=1, heads={2: [0, 3]}, normalize=True)
    path = config.save_pretrained(tmp_path / "model")
    assert [each.name for each in path.parent.iterdir()] == ["rebalance_config.json"]
    assert RebalanceConfig.from_pretrained(tmp_path / "model") == config
    RebalanceConfig(alpha=0.1).save_pretrained(path.parent)
    assert RebalanceConfig.from_pretrained(str(path.parent)).alpha == 0.1


def test_a_folder_without_a_configuration(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"model: there is no rebalance_config\.json in"):
        RebalanceConfig.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="is not a folder here, and no rebalance_config"):
        RebalanceConfig.from_pretrained(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("{", ValueError, "rebalance_config.json: Expecting"),
        ("[]", TypeError, "rebalance_config.json: options: expected a mapping, got list"),
        ('{"alfa": 1}', ValueError, "rebalance_config.json: options: unknown 'alfa'"),
        ('{"alpha": "1"}', TypeError, "rebalance_config.json: alpha: expected a number"),
    ],
)
def test_a_broken_configuration_file(tmp_path: Path, text: str, error: type[Exception], message: str) -> None:
    (tmp_path / "rebalance_config.json").write_text(text)
    with pytest.raises(error, match=message):
        RebalanceConfig.from_pretrained(tmp_path)


def test_layers_without_attention_are_left_out_unless_they_are_named() -> None:
    """What is named and turns out to have none is an error, which the patch raises at the first forward."""
    shape = ModelShape(5, 2, (True, True, False, True, True))
    assert [gain is None for gain in Rebalance().gain_rows(shape)] == [True, False, True, False, True]
    assert Rebalance(layers=[2, 3]).gain_rows(shape)[2] is not None
    assert Rebalance(heads={2: [0]}).gain_rows(shape)[2] is not None
    assert Rebalance(heads=[0]).gain_rows(shape)[2] is None
