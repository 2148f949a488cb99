"""`scripts/eval.py` on a run's products."""

from __future__ import annotations

import json

import pytest

from lora_lightning import LoraConfig, inject_lora, save_adapter
from lora_lightning.adapters.folder import chain_of
from lora_lightning.adapters.merge import fold_in
from lora_lightning.cli.eval import main
from lora_lightning.injection.state import record_of, the_root
from lora_lightning.tasks import ModelConfig, load_model


@pytest.mark.parametrize("settings", [[], ["model.in_parts=true"]])
def test_base_and_adapter_side_by_side(smoke, call, tmp_path, settings):
    folder, _ = smoke
    done = call(main, "experiment=smoke", f"adapter={folder}/adapter", *settings, f"hydra.run.dir={tmp_path}")
    assert done.status == 0, done.stderr
    trained = json.loads((folder / "result.json").read_text())
    measured = json.loads((tmp_path / "eval.json").read_text())
    assert measured["base"]["val_loss"] == pytest.approx(trained["val_loss_before"], rel=1e-5)
    assert measured["adapted"]["val_loss"] == pytest.approx(trained["val_loss"], rel=1e-5)
    assert "With adapter" in done.stdout


def test_a_checkpoint_is_measured_likewise(smoke, call, tmp_path):
    folder, _ = smoke
    checkpoint = folder / "checkpoints" / "last.ckpt"
    done = call(main, "experiment=smoke", f"ckpt_path={checkpoint}", f"hydra.run.dir={tmp_path}")
    assert done.status == 0, done.stderr
    measured = json.loads((tmp_path / "eval.json").read_text())
    assert measured["adapted"]["val_loss"] == pytest.approx(
        json.loads((folder / "result.json").read_text())["val_loss"], rel=1e-5
    )


def test_an_adapter_over_another_is_measured_over_it(smoke, call, tmp_path):
    folder, _ = smoke
    below = folder / "adapter"
    model = load_model(ModelConfig("demo:tiny-llama"), "causal_lm")
    fold_in(model, below)
    inject_lora(model, LoraConfig(r=2))
    record_of(the_root(model)[1]).bases = chain_of(below)
    save_adapter(model, tmp_path / "above")  # B is 0: what it measures is what the one below it does
    done = call(main, "experiment=smoke", f"adapter={tmp_path}/above", f"hydra.run.dir={tmp_path}/run")
    assert done.status == 0, done.stderr
    measured = json.loads((tmp_path / "run" / "eval.json").read_text())
    expected = pytest.approx(json.loads((folder / "result.json").read_text())["val_loss"], rel=1e-5)
    assert (measured["base"]["val_loss"], measured["adapted"]["val_loss"]) == (expected, expected)


@pytest.mark.parametrize(("given", "part"), [([], "got neither"), (["adapter=a", "ckpt_path=b"], "got both")])
def test_one_of_the_two_has_to_be_named(call, tmp_path, given, part):
    done = call(main, "experiment=smoke", *given, f"hydra.run.dir={tmp_path}")
    assert done.status == 1
    assert part in done.stderr
    assert "Traceback" not in done.stderr


def test_a_missing_adapter_is_a_message(call, tmp_path):
    done = call(main, "experiment=smoke", "adapter=/nowhere", f"hydra.run.dir={tmp_path}")
    assert done.status == 1
    assert "/nowhere" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_runs_folder_says_what_it_was_made_with_and_single_keys_go_on_top(smoke, call, tmp_path):
    folder, _ = smoke
    trained = json.loads((folder / "result.json").read_text())
    done = call(main, f"adapter={folder}", "data.val_rows=16", f"hydra.run.dir={tmp_path}")
    assert done.status == 0, done.stderr
    assert f"model, data, task: as in {folder}" in done.stdout
    assert "better" in done.stdout
    measured = json.loads((tmp_path / "eval.json").read_text())
    some = call(main, "experiment=smoke", "data.val_rows=16", f"adapter={folder}", f"hydra.run.dir={tmp_path}")
    assert "as in" not in some.stdout
    assert json.loads((tmp_path / "eval.json").read_text())["adapted"] == measured["adapted"]
    assert measured["adapted"]["val_loss"] != pytest.approx(trained["val_loss"], rel=1e-5)


def test_what_a_sweep_is_to_go_by_has_to_be_measured(smoke, call, tmp_path):
    done = call(main, f"adapter={smoke[0]}", "optimized_metric=val_lss", f"hydra.run.dir={tmp_path}")
    assert done.status == 1
    assert "did you mean val_loss" in done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "eval.json").exists()


def test_tasks_of_the_harness_for_both(smoke, call, tmp_path, colours):
    folder, _ = smoke
    done = call(
        main,
        f"adapter={folder}",
        "split=null",
        "lm_eval=[colours]",
        f"lm_eval_tasks_path={colours.folder}",
        "lm_eval_limit=4",
        f"hydra.run.dir={tmp_path}",
    )
    assert done.status == 0, done.stderr
    measured = json.loads((tmp_path / "eval.json").read_text())
    assert measured["lm_eval"]["limit"] == 4
    assert measured["lm_eval"]["base"].keys() == measured["lm_eval"]["adapted"].keys() == {"colours acc"}
    assert measured["base"] == {}
    assert "colours acc" in done.stdout


@pytest.mark.parametrize(
    ("given", "part"),
    [
        (["split=null"], "nothing to measure"),
        (["split=train"], "val, test or null"),
        (["lm_eval=arc_easy", "lm_eval_tasks_path=/nowhere"], "no folder"),
        (["lm_eval=arc_easy", "task=sequence_classification"], "asks causal language models"),
        (["lm_eval=arc_easy", "trainer=ddp", "trainer.accelerator=cpu", "trainer.num_nodes=2"], "and here are 2"),
    ],
)
def test_what_cannot_be_measured_is_told_before_anything_is_loaded(smoke, call, tmp_path, given, part):
    done = call(main, f"adapter={smoke[0]}", *given, f"hydra.run.dir={tmp_path}")
    assert done.status == 1
    assert part in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "eval.json").exists()
