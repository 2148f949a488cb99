"""Adapters on the Hub, without one: a cache laid out as huggingface_hub lays it out, and a stub of its very edge."""

from __future__ import annotations

import copy
import shutil
from types import SimpleNamespace

import huggingface_hub
import lightning.pytorch as pl
import pytest
import torch
from huggingface_hub import constants, errors

from lora_lightning import AdapterError, LoraCallback, LoraConfig, inject_lora, load_adapter, push_adapter, save_adapter
from lora_lightning.adapters.hub import adapter_folder, id_of, on_the_hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OLDER = "89abcdef0123456789abcdef0123456789abcdef"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty Hub cache, and no network: as HF_HUB_OFFLINE=1 and HF_HUB_CACHE set them at import."""
    cache = tmp_path / "cache"
    cache.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return cache


def put(cache, folder, name="someone/headlines", commit=COMMIT, ref="main"):
    """A repository in the cache: blobs/, snapshots/<commit>/ with links to them, refs/<name>."""
    place = cache / f"models--{name.replace('/', '--')}"
    (place / "blobs").mkdir(parents=True, exist_ok=True)
    (place / "refs").mkdir(exist_ok=True)
    (place / "snapshots" / commit).mkdir(parents=True)
    for path in sorted(folder.iterdir()):
        blob = place / "blobs" / f"{commit[:6]}-{path.name}"
        shutil.copy2(path, blob)
        (place / "snapshots" / commit / path.name).symlink_to(blob)
    (place / "refs" / ref).write_text(commit)


@pytest.fixture
def adapter(llama, shake, tmp_path):
    """A base, an adapted model over it, and its folder."""
    base = copy.deepcopy(llama)
    inject_lora(llama, LoraConfig(r=2, lora_alpha=4))
    shake(llama)
    return base, llama, save_adapter(llama, tmp_path / "saved")


def test_what_is_a_name_on_the_hub_and_what_is_not():
    assert id_of("owner/name") == ("owner/name", None)
    assert id_of("owner-1/na.me_2@refs/pr/3") == ("owner-1/na.me_2", "refs/pr/3")
    for place in ("name", "./owner/name", "/owner/name", "~/name", "a/b/c", "owner/", "owner/name@", "ow ner/name"):
        assert id_of(place) is None, place
    assert id_of(constants.HF_HUB_CACHE + "/x") is None


def test_a_base_is_on_the_hub_where_no_folder_has_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models/base").mkdir(parents=True)
    names = (
        "owner/base",
        "gpt2",
        "bert-base-uncased",
        "models/base",
        "models",
        "demo:tiny-llama",
        "./x",
        "a/b/c",
        "/x",
    )
    assert [name for name in names if on_the_hub(name)] == ["owner/base", "gpt2", "bert-base-uncased"]


@pytest.mark.parametrize("place", ["someone/headlines", "someone/headlines@main", f"someone/headlines@{COMMIT}"])
def test_an_adapter_is_loaded_out_of_the_cache(hub, adapter, tokens, place):
    base, model, folder = adapter
    put(hub, folder)
    load_adapter(base, place)
    assert torch.equal(base(tokens).logits, model(tokens).logits)


def test_a_revision_is_a_branch_a_tag_or_a_commit(hub, adapter, tokens, shake, tmp_path):
    base, model, folder = adapter
    put(hub, folder, commit=OLDER, ref="v1")
    before = model(tokens).logits
    shake(model)
    put(hub, save_adapter(model, tmp_path / "second"))
    for place, logits in (("v1", before), (OLDER, before), ("main", model(tokens).logits)):
        other = copy.deepcopy(base)
        load_adapter(other, f"someone/headlines@{place}")
        assert torch.equal(other(tokens).logits, logits)


def test_a_folder_of_that_name_goes_first(hub, adapter, tmp_path):
    _, _, folder = adapter
    put(hub, folder)
    shutil.copytree(folder, tmp_path / "someone" / "headlines")
    assert not adapter_folder("someone/headlines").is_absolute()
    assert str(hub) in str(adapter_folder("someone/headlines@main"))


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (
            "no/such",
            r"no folder .*no/such, and from the Hub it cannot be had: no/such is not in the Hub's cache .*offline",
        ),
        ("someone/headlines@v9", r"revision 'v9' of someone/headlines is not in the Hub's cache"),
        ("runs/nothing/adapter", "there is no folder runs/nothing/adapter"),
        ("nothing", "there is no folder nothing"),
    ],
)
def test_what_cannot_be_had_is_told(hub, adapter, place, message):
    base, _, folder = adapter
    put(hub, folder)
    with pytest.raises(AdapterError, match=message):
        load_adapter(base, place)


def test_a_pickle_on_the_hub_is_not_read(hub, adapter):
    base, _, folder = adapter
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    put(hub, folder)
    with pytest.raises(AdapterError, match=r"has no adapter_model\.safetensors \(pickles"):
        load_adapter(base, "someone/headlines")


def test_only_what_is_read_is_downloaded(monkeypatch, tmp_path):
    asked = {}
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **how: asked.update(how, name=name) or tmp_path
    )
    with pytest.raises(AdapterError, match=r"no adapter_config\.json and no adapter_model\.safetensors"):
        adapter_folder("no/such@v2")
    assert (asked["name"], asked["revision"]) == ("no/such", "v2")
    assert "adapter_model.safetensors" in asked["allow_patterns"]
    assert not any("bin" in pattern or pattern == "*" for pattern in asked["allow_patterns"])


class Module(pl.LightningModule):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def training_step(self, batch):
        return self.network(batch, labels=batch).loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.network.parameters(), lr=0.0)


@pytest.mark.parametrize("argument", ["adapter", "base_adapter"])
def test_a_run_goes_on_from_the_hub(hub, adapter, tokens, tmp_path, argument):
    base, model, folder = adapter
    put(hub, folder)
    module = Module(base)
    callback = LoraCallback(**{argument: "someone/headlines"})
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "max_steps": 1}
    trainer = pl.Trainer(default_root_dir=tmp_path, accelerator="cpu", callbacks=[callback], **options)
    trainer.fit(module, torch.utils.data.DataLoader(tokens, batch_size=2))
    torch.testing.assert_close(module.network.eval()(tokens).logits, model(tokens).logits, rtol=1e-5, atol=1e-5)
    if argument == "adapter":
        assert callback.report.rows[0].r == 2
    else:
        assert "someone/headlines" in (callback.adapter_path / "lora_lightning.json").read_text()


# ---- sending


class Sent:
    """What would go to the Hub, by way of a stub of its client; files are read as that would read them."""

    def __init__(self, monkeypatch, *, error=None, there=()):
        self.calls, self.files, self.deleted = [], {}, set()
        sent = self

        class Api:
            def __init__(self, token=None):
                self.token = token

            def create_repo(self, name, **how):
                if error is not None:
                    raise error
                sent.calls.append(("create_repo", name, how))

            def create_branch(self, name, **how):
                sent.calls.append(("create_branch", name, how))

            def list_repo_files(self, name, revision=None):
                return [".gitattributes", *there]

            def create_commit(self, name, operations, **how):
                sent.calls.append(("create_commit", name, how))
                for operation in operations:
                    if isinstance(operation, huggingface_hub.CommitOperationDelete):
                        sent.deleted.add(operation.path_in_repo)
                        continue
                    with operation.as_file() as file:
                        sent.files[operation.path_in_repo] = file.read()
                return SimpleNamespace(
                    commit_url="https://huggingface.co/commit/1", pr_url="https://huggingface.co/pr/1"
                )

        monkeypatch.setattr(huggingface_hub, "HfApi", Api)


def test_a_folder_is_sent_with_its_tokenizer_and_a_card(adapter, monkeypatch):
    _, _, folder = adapter
    for name in ("tokenizer.json", "tokenizer_config.json", "last.ckpt", "adapter_model.bin", "notes.txt"):
        (folder / name).write_text(name)
    sent = Sent(monkeypatch)
    address = push_adapter(folder, "someone/headlines", private=True, message="First")
    assert address == "https://huggingface.co/commit/1"
    ours = {"adapter_config.json", "adapter_model.safetensors", "lora_lightning.json"}
    assert sent.files.keys() == ours | {"tokenizer.json", "tokenizer_config.json", "README.md"}
    assert all(sent.files[name] == (folder / name).read_bytes() for name in ours)
    assert b"library_name: peft" in sent.files["README.md"]
    assert sent.calls[0] == ("create_repo", "someone/headlines", {"private": True, "exist_ok": True})
    assert [call[0] for call in sent.calls] == ["create_repo", "create_commit"]
    assert sent.calls[1][2]["commit_message"] == "First"


def test_a_model_is_sent_to_a_branch_as_a_pull_request(adapter, monkeypatch):
    _, model, folder = adapter
    sent = Sent(monkeypatch, there=["README.md"])
    address = push_adapter(model, "someone/headlines@trial", create_pr=True)
    assert address == "https://huggingface.co/pr/1"
    assert sent.files["adapter_model.safetensors"] == (folder / "adapter_model.safetensors").read_bytes()
    assert "README.md" not in sent.files  # there is one
    assert ("create_branch", "someone/headlines", {"branch": "trial", "exist_ok": True}) in sent.calls
    assert (sent.calls[-1][2]["revision"], sent.calls[-1][2]["create_pr"]) == ("trial", True)


def test_nothing_stays_of_the_adapter_that_was_there(adapter, monkeypatch):
    _, _, folder = adapter
    (folder / "lora_lightning.json").unlink()  # as PEFT writes a folder
    before = ["adapter_config.json", "lora_lightning.json", "modules_outside.safetensors", "README.md", "plot.png"]
    sent = Sent(monkeypatch, there=before)
    push_adapter(folder, "someone/headlines")
    assert sent.deleted == {"lora_lightning.json", "modules_outside.safetensors"}
    assert sent.files.keys() == {"adapter_config.json", "adapter_model.safetensors"}


def test_what_is_sent_can_be_loaded_from_there(hub, adapter, tokens, monkeypatch, tmp_path):
    base, model, _ = adapter
    sent = Sent(monkeypatch)
    push_adapter(model, "someone/headlines")
    (tmp_path / "there").mkdir()
    for name, content in sent.files.items():
        (tmp_path / "there" / name).write_bytes(content)
    put(hub, tmp_path / "there")
    load_adapter(base, "someone/headlines")
    assert torch.equal(base(tokens).logits, model(tokens).logits)


def test_the_card_names_a_base_that_the_hub_has(llama, monkeypatch, tmp_path):
    inject_lora(llama, LoraConfig(r=2))
    llama.name_or_path = "someone/tiny-llama"
    sent = Sent(monkeypatch)
    push_adapter(llama, "someone/headlines")
    assert b"base_model: someone/tiny-llama\n" in sent.files["README.md"]
    llama.name_or_path = str(tmp_path)
    push_adapter(llama, "someone/headlines")
    assert str(tmp_path).encode() not in sent.files["README.md"]


def test_what_is_no_adapter_is_not_sent(adapter, llama, monkeypatch, tmp_path):
    _, _, folder = adapter
    sent = Sent(monkeypatch)
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    with pytest.raises(AdapterError, match="owner/name"):
        push_adapter(folder, "headlines")
    with pytest.raises(AdapterError, match=r"no adapter_config\.json"):
        push_adapter(nothing, "someone/headlines")
    (folder / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(AdapterError, match="damaged"):
        push_adapter(folder, "someone/headlines")
    assert not sent.calls


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (errors.LocalEntryNotFoundError("offline"), "cannot be reached"),
        (OSError("no route to host"), "no route to host"),
        (ValueError("bad name"), "bad name"),
    ],
)
def test_what_the_hub_refuses_is_told(adapter, monkeypatch, error, message):
    _, _, folder = adapter
    Sent(monkeypatch, error=error)
    with pytest.raises(AdapterError, match=f"was not sent to someone/headlines: .*{message}"):
        push_adapter(folder, "someone/headlines")


def test_a_token_that_may_not_write_is_told(adapter, monkeypatch):
    _, _, folder = adapter
    error = errors.HfHubHTTPError.__new__(errors.HfHubHTTPError)
    error.response = SimpleNamespace(status_code=403)
    error.args = ("forbidden",)
    Sent(monkeypatch, error=error)
    with pytest.raises(AdapterError, match=r"token that was used .* may not do that"):
        push_adapter(folder, "someone/headlines")
