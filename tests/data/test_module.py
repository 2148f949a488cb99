import json
import subprocess
import sys

import lightning.pytorch as pl
import pytest
import torch

from lora_lightning.data import TextData
from lora_lightning.data.encode import Tally
from lora_lightning.data.preview import marked
from lora_lightning.errors import LoraConfigError
from tests.data.test_resume import Recorder

pytestmark = pytest.mark.usefixtures("warm_starts")


def test_a_tokenizer_is_taken_from_the_lightning_module(tokenizer, numbered, tmp_path):
    data = TextData(str(numbered(20)))
    with pytest.raises(LoraConfigError, match="TextData has no tokenizer"):
        data.setup()
    trainer = pl.Trainer(fast_dev_run=1, accelerator="cpu", default_root_dir=tmp_path, enable_progress_bar=False)
    trainer.fit(Recorder(tokenizer), datamodule=data)
    assert data.tokenizer is tokenizer


def test_training_without_validation_rows(tokenizer, numbered, tmp_path):
    module = Recorder(tokenizer)
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, default_root_dir=tmp_path, enable_progress_bar=False,
        enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(module, datamodule=TextData(str(numbered(8)), tokenizer=tokenizer, val_split=0))
    assert len(module.seen) == 2


def test_loaders_before_setup(tokenizer):
    with pytest.raises(RuntimeError, match=r"call setup\('fit'\) first"):
        TextData("x", tokenizer=tokenizer).train_dataloader()


def test_marks_stand_around_each_trained_stretch(tokenizer):
    ids = tokenizer("one [bold] two three", add_special_tokens=False)["input_ids"]
    labels = [-100] * 2 + ids[2:4] + [-100] * (len(ids) - 5) + ids[-1:]
    text = marked({"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}, tokenizer).plain
    decode = tokenizer.decode
    assert text == f"{decode(ids[:2])}⟦{decode(ids[2:4])}⟧{decode(ids[4:-1])}⟦{decode(ids[-1:])}⟧"
    assert text.replace("⟦", "").replace("⟧", "") == "one [bold] two three"


def test_long_stretches_are_shortened(tokenizer):
    ids = tokenizer("word " * 1000, add_special_tokens=False)["input_ids"]
    text = marked({"input_ids": torch.tensor(ids), "labels": torch.full((len(ids),), -100)}, tokenizer).plain
    assert "… 4,400 characters …" in text


def test_no_rows_at_all_is_refused():
    with pytest.raises(LoraConfigError, match="There is no row"):
        Tally().require_labels("training", 9)


def test_lightning_cli_reads_the_signature():
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser()
    parser.add_class_arguments(TextData, "data")
    arguments = parser.parse_args(["--data.path=x", "--data.train_on=last", "--data.batch_size=2"])
    data = parser.instantiate_classes(arguments).data
    assert (data.path, data.train_on, data.batch_size, data.max_length) == ("x", "last", 2, 512)


TWO_PROCESSES = """
import json, sys, torch
import lightning.pytorch as pl
from lora_lightning.data import TextData
from tests.data.conftest import CHATML, train_tokenizer
from tests.data.test_resume import Recorder

class Both(Recorder):
    validated = ()
    def validation_step(self, batch):
        self.validated = [*self.validated, *(row for row in self.rows(batch) if row)]

path, out = sys.argv[1:]
tokenizer = train_tokenizer()
tokenizer.chat_template = CHATML
module = Both(tokenizer)
trainer = pl.Trainer(
    accelerator="cpu", devices=2, strategy="ddp", max_epochs=2, logger=False, enable_checkpointing=False,
    enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, default_root_dir=out,
)
trainer.fit(module, datamodule=TextData(path, tokenizer=tokenizer, val_split=0.23))
json.dump([module.seen, module.validated], open(f"{out}/{trainer.global_rank}.json", "w"))
torch.distributed.destroy_process_group()  # no LoraCallback here, which would see to it
"""


def test_two_processes_share_the_rows_with_no_flag_given(numbered, tmp_path):
    (tmp_path / "run.py").write_text(TWO_PROCESSES)
    done = subprocess.run(
        [sys.executable, tmp_path / "run.py", numbered(30), tmp_path],
        env={"PYTHONPATH": ":".join(sys.path), "PATH": "", "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)},
        capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("One training example") == 1
    (one, validated_one), (two, validated_two) = (json.loads((tmp_path / f"{n}.json").read_text()) for n in (0, 1))
    assert len(one) == len(two) == 6
    for epoch in range(2):
        rows = [row for part in (one, two) for _, batch in part[3 * epoch : 3 * epoch + 3] for row in batch]
        assert len(rows) == 24
        assert len(set(rows)) == 23
    assert len(validated_one + validated_two) == 2 * 7
    assert set(validated_one) | set(validated_two) | set(rows) == {f"answer {n}" for n in range(30)}
