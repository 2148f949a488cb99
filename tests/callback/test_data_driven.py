"""``init_lora_weights`` eva, corda and lora_ga under a Trainer, which shows the adapter its own batches."""

import itertools

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import ChainDataset, DataLoader, IterableDataset, RandomSampler, TensorDataset
from torchmetrics import MeanMetric, MetricCollection

from lora_lightning import (
    LoraCallback,
    LoraConfigError,
    load_adapter,
    load_from_checkpoint,
    lora_state_dict,
    unload_lora,
)
from lora_lightning.adapters import adapter_from_checkpoint
from lora_lightning.injection.state import lora_layers

pytestmark = pytest.mark.usefixtures("warm_starts")

DRIVEN = ["eva", "corda", "lora_ga"]


def lora(how, r=1, **fields):
    return LoraCallback({"r": r, "init_lora_weights": how, **fields})


def data():
    generator = torch.Generator().manual_seed(11)
    rows = TensorDataset(torch.randn(40, 8, generator=generator), torch.randn(40, 2, generator=generator))
    return DataLoader(rows, batch_size=8)


class _Seen(pl.Callback):
    """Notes the batches that are trained on, and the adapter before the first."""

    def __init__(self):
        self.batches, self.first = [], None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.first is None:
            self.first = {name: value.clone() for name, value in lora_state_dict(pl_module).items()}
        self.batches.append((batch[0] if isinstance(batch[0], torch.Tensor) else batch[0][0]).clone())


def uneven():
    """A network whose later layers have inputs along one direction, so that EVA gives the first one most ranks."""
    torch.manual_seed(5)
    net = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 2))
    net[0].weight.data = torch.outer(torch.randn(16), torch.randn(8)) + 1e-3 * torch.randn(16, 8)
    return net


def fit(make_trainer, module, *callbacks, ckpt_path=None, **options):
    pl.seed_everything(1, verbose=False)
    trainer = make_trainer(*callbacks, **options)
    trainer.fit(module, ckpt_path=ckpt_path)
    return trainer


@pytest.mark.parametrize("how", DRIVEN)
def test_the_preset_is_all_that_a_user_writes(how, make_trainer, module_class):
    plain, seen = _Seen(), _Seen()
    fit(make_trainer, module_class(), lora(True), plain)
    module = module_class()
    base = {name: value.clone() for name, value in module.net.state_dict().items()}
    callback = lora(how)
    fit(make_trainer, module, callback, seen)
    # What training draws is what it would have drawn.
    assert all(torch.equal(a, b) for a, b in zip(seen.batches, plain.batches, strict=True))
    assert any(not torch.equal(value, plain.first.get(name, value[:0])) for name, value in seen.first.items())
    assert callback.report is not None
    assert {row.name for row in callback.report.rows} == {name for name, _ in lora_layers(module)}
    x = torch.randn(6, 8)
    expected = module.net.eval()(x)
    again = module_class()
    load_adapter(again, callback.adapter_path)
    torch.testing.assert_close(again.net.eval()(x), expected, atol=1e-5, rtol=1e-5)
    unload_lora(module)
    assert all(torch.equal(value, base[name]) for name, value in module.net.state_dict().items())


@pytest.mark.parametrize(
    ("how", "precision"), [*((how, "32-true") for how in (*DRIVEN, "mica")), ("pissa", "bf16-true")]
)
def test_a_resumed_run_ends_as_the_uninterrupted_one(how, precision, make_trainer, module_class, tmp_path):
    fields = {"r": 2, "eva_config": {"rho": 4.0}} if how == "eva" else {}
    plain = uneven() if how == "eva" else None

    def run(folder, ckpt_path=None):
        module = module_class(uneven() if how == "eva" else None)
        saves = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
        options = {"max_epochs": 3, "default_root_dir": folder, "precision": precision}
        fit(make_trainer, module, lora(how, **fields), saves, ckpt_path=ckpt_path, **options)
        return module

    whole = run(tmp_path / "whole")
    checkpoint = tmp_path / "whole" / "epoch=0.ckpt"
    content = torch.load(checkpoint, weights_only=True)
    assert all("lora" in name for name in content["state_dict"])
    resumed = run(tmp_path / "resumed", checkpoint)
    for (name, one), (_, other) in zip(whole.state_dict().items(), resumed.state_dict().items(), strict=True):
        assert torch.equal(one, other), name
    ranks = {layer.lora_r for _, layer in lora_layers(whole)}
    assert ranks == ({1, 4} if how == "eva" else {1})
    other = module_class(uneven() if how == "eva" else None)
    load_adapter(other, adapter_from_checkpoint(tmp_path / "whole" / "epoch=2.ckpt", tmp_path / "made"))
    loaded = load_from_checkpoint(module_class, tmp_path / "whole" / "epoch=2.ckpt", net=plain)
    x = torch.randn(4, 8, dtype=whole.net[0].weight.dtype)
    expected, atol = whole.net.eval()(x), 1e-5 if precision == "32-true" else 0.05
    for each in (loaded, other):
        torch.testing.assert_close(each.to(x.dtype).net.eval()(x), expected, atol=atol, rtol=0)


def test_a_second_trainer_goes_on_where_the_first_ended(make_trainer, module_class, tmp_path):
    callback, module = lora("eva"), module_class()
    fit(make_trainer, module, callback, max_epochs=1)
    ranks = {name: layer.lora_r for name, layer in lora_layers(module)}
    fit(make_trainer, module, lora("eva"), max_epochs=1)
    assert ranks == {name: layer.lora_r for name, layer in lora_layers(module)}
    other = module_class()
    fit(make_trainer, other, LoraCallback(adapter=callback.adapter_path), max_epochs=1)
    assert ranks == {name: layer.lora_r for name, layer in lora_layers(other)}


def test_validation_before_training_awaits_the_data(make_trainer, module_class):
    seen, module = _Seen(), module_class()
    callback = lora("lora_ga")
    make_trainer(callback).validate(module, verbose=False)
    assert not any(value.any() for name, value in lora_state_dict(module).items() if name.endswith("_start"))
    fit(make_trainer, module, callback, seen)
    assert all(value.any() for name, value in seen.first.items() if name.endswith("_start"))


def test_averages_begin_with_what_data_have_shown(make_trainer, module_class):
    averaging = pl.callbacks.StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=1)
    module = module_class()
    fit(make_trainer, module, averaging, lora("eva"), max_epochs=3)
    assert all(torch.isfinite(value).all() for value in lora_state_dict(module).values())


def test_what_cannot_be_asked_for_a_loss_is_told(make_trainer, module_class):
    class Manual(module_class):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

    with pytest.raises(LoraConfigError, match="steps its optimizers by itself"):
        fit(make_trainer, Manual(), lora("lora_ga"))


class _OnePass(IterableDataset):
    """A stream that goes on where it was left."""

    def __init__(self):
        self.rows = iter(data())

    def __iter__(self):
        return self.rows


class _Itself(_OnePass):
    def __iter__(self):
        return self

    def __next__(self):
        return next(self.rows)


class _Held(IterableDataset):
    """Each iterator is a new one, over a generator that goes on where it was left."""

    def __init__(self):
        self.rows = (row for row in data())

    def __iter__(self):
        yield from self.rows


@pytest.mark.parametrize(
    "once",
    [
        lambda: DataLoader(_Held(), batch_size=None),
        lambda: DataLoader(ChainDataset([_Held()]), batch_size=None),
        lambda: DataLoader(_OnePass(), batch_size=None),
        lambda: DataLoader(_Itself(), batch_size=None),
        lambda: iter(data()),
        lambda: [data(), DataLoader(_OnePass(), batch_size=None)],
    ],
    ids=["held", "chained", "dataset", "itself", "loader", "one of two"],
)
def test_data_that_can_be_read_once_are_refused_and_left_whole(once, make_trainer, module_class):
    """Looking at them would leave nothing to train on."""

    class Two(module_class):
        def loss(self, batch):
            return super().loss(batch[0] if isinstance(batch[0], list) else batch)

    loaders = once()
    with pytest.raises(LoraConfigError, match="initialise_from_data"):
        make_trainer(lora("corda")).fit(Two(), loaders)
    seen = _Seen()
    make_trainer(lora(True), seen).fit(Two(), once() if isinstance(loaders, list) else loaders)
    assert len(seen.batches) == 5


def test_a_stream_that_can_be_read_again_is_not_refused(make_trainer, module_class):
    class Stream(IterableDataset):
        def __init__(self):
            self.numbers = itertools.count()

        def __iter__(self):
            next(self.numbers)
            yield from data()

    seen = _Seen()
    make_trainer(lora("eva"), seen).fit(module_class(), DataLoader(Stream(), batch_size=None))
    assert len(seen.batches) == 5


@pytest.mark.parametrize("where", ["loader", "sampler", "both"])
def test_generators_of_a_loader_draw_what_they_would_have_drawn(where, make_trainer, module_class):
    def loader():
        rows, generators = data().dataset, [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        sampler = None if where == "loader" else RandomSampler(rows, generator=generators[0])
        own = None if where == "sampler" else generators[1]
        return DataLoader(rows, batch_size=8, sampler=sampler, shuffle=sampler is None, generator=own)

    orders = []
    for how in (True, "eva"):
        seen = _Seen()
        pl.seed_everything(1, verbose=False)
        make_trainer(lora(how), seen, max_epochs=2).fit(module_class(), loader())
        orders.append(torch.cat(seen.batches))
    assert torch.equal(*orders)


def test_metrics_of_a_module_count_only_what_is_trained_on(make_trainer, module_class):
    class Counting(module_class):
        def __init__(self):
            super().__init__()
            self.metrics = MetricCollection([MeanMetric()])

        def training_step(self, batch, batch_idx):
            self.metrics.update(torch.ones(()))
            return super().training_step(batch, batch_idx)

    module = Counting()
    fit(make_trainer, module, lora("corda"))
    assert module.metrics["MeanMetric"].weight.item() == 5


SCRIPT = """
import sys
import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from lora_lightning import LoraCallback, lora_state_dict

out, hows = sys.argv[1], sys.argv[2:]
torch.set_num_threads(1)


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2))

    def training_step(self, batch, batch_idx):
        loss = (self.net(batch[0]) - batch[1]).square().mean()
        self.log("loss", loss, sync_dist=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-2)


generator = torch.Generator().manual_seed(11)
data = TensorDataset(torch.randn(40, 8, generator=generator), torch.randn(40, 2, generator=generator))
for how in hows:
    pl.seed_everything(3 + int(__import__("os").environ.get("LOCAL_RANK", 0)), verbose=False)  # other batches on each
    module = Module()
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", devices=2, strategy="ddp", default_root_dir=out, logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        callbacks=[LoraCallback({"r": 1, "init_lora_weights": how})],
    )
    trainer.fit(module, DataLoader(data, batch_size=8, shuffle=True))
    torch.save(lora_state_dict(module) | dict(module.named_parameters()), f"{out}/{how}-{trainer.global_rank}.pt")
"""


def test_two_processes_begin_alike(tmp_path):
    import os
    import subprocess
    import sys

    (tmp_path / "script.py").write_text(SCRIPT)
    env = {**os.environ, "PYTHONPATH": os.getcwd()}
    command = [sys.executable, tmp_path / "script.py", tmp_path, "eva", "lora_ga"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for how in ("eva", "lora_ga"):
        one, other = (torch.load(tmp_path / f"{how}-{rank}.pt", weights_only=False) for rank in (0, 1))
        assert one.keys() == other.keys()
        assert all(torch.equal(value, other[name]) for name, value in one.items())
