import pytest
from torch.utils.data import DataLoader

from lora_lightning.data import TextData
from lora_lightning.data.chat import ChatRenderer
from lora_lightning.data.encode import Encoder
from lora_lightning.data.loaders import Collator
from lora_lightning.data.sources import FileSource
from lora_lightning.data.stream import RowStream
from lora_lightning.errors import LoraConfigError


def answers(tokenizer, batches):
    return [
        tokenizer.decode(ids[labels != -100].tolist(), skip_special_tokens=True).strip()
        for batch in batches
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True)
    ]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_and_workers_share_the_rows(tokenizer, numbered, world, workers):
    count = 20
    path = numbered(count)
    found = []
    for rank in range(world):
        encoder = Encoder(ChatRenderer(tokenizer), max_length=99)
        stream = RowStream([FileSource(path)], encoder, rank=rank, world=world)
        found.append(answers(tokenizer, DataLoader(stream, 2, num_workers=workers, collate_fn=Collator())))
    assert len({len(share) for share in found}) == 1
    everything = [answer for share in found for answer in share]
    assert set(everything) == {f"answer {n}" for n in range(count)}
    assert len(everything) - count < world * max(workers, 1)
    assert world > 1 or len(everything) == count


def test_ranks_stay_in_step_where_rows_are_dropped(tokenizer, write):
    asked = "one two three four five six seven"
    rows = [{"prompt": asked if n % 4 == 1 else "q", "completion": f"answer {n}"} for n in range(21)]
    encoder = Encoder(ChatRenderer(tokenizer), max_length=20)
    shares = [
        len(list(RowStream([FileSource(write(rows))], encoder, rank=rank, world=2))) for rank in range(2)
    ]  # fmt: skip
    assert shares == [8, 8]


def test_a_streaming_module_has_no_length_and_holds_rows_out(tokenizer, numbered, capsys):
    data = TextData(str(numbered(60)), tokenizer=tokenizer, streaming=True, val_split=0.2)
    data.setup("fit")
    loader = data.train_dataloader()
    with pytest.raises(TypeError):
        len(loader)
    train, held = answers(tokenizer, loader), answers(tokenizer, data.val_dataloader())
    assert sorted(train + held) == sorted(f"answer {n}" for n in range(60))
    assert len(held) > 3
    assert answers(tokenizer, loader) == train
    assert "60 rows read as prompt_completion" in capsys.readouterr().out


def test_too_many_bad_rows_end_a_stream(tokenizer, write):
    rows = [{"prompt": "q", "completion": "a"}] * 2500 + [{"prompt": "q"}] * 500
    data = TextData(str(write(rows)), tokenizer=tokenizer, streaming=True)
    data.setup()
    with pytest.raises(LoraConfigError, match="cannot be used, more than 5%"):
        list(data.train_dataloader())
