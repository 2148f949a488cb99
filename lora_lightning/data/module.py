"""What all data modules share: their options, their loaders, and what they tell before training."""

from __future__ import annotations

from abc import abstractmethod
from typing import TypedDict

from lightning.pytorch import LightningDataModule
from rich.console import Console, RenderableType
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from transformers import PreTrainedTokenizerBase

from lora_lightning.data.cache import load_cached
from lora_lightning.data.encode import Example
from lora_lightning.data.loaded import Loaded, SamplePrompt
from lora_lightning.data.loaders import Collator, ResumableLoader, loader_options
from lora_lightning.data.packing import PackedRows, PackingCollator, PackingSampler, how_full
from lora_lightning.data.preview import marked, summary
from lora_lightning.data.samplers import LengthGroupedSampler, ShardSampler, rank_and_world
from lora_lightning.data.stream import RowStream
from lora_lightning.errors import LoraConfigError


class CommonOptions(TypedDict, total=False):
    """Options of every data module but ``max_length``, whose default is not the same for all."""

    tokenizer: PreTrainedTokenizerBase | None
    batch_size: int
    val_batch_size: int | None
    num_workers: int
    seed: int
    samples: int
    group_by_length: bool
    pad_to_multiple_of: int | None
    cache: bool | str


class Options(CommonOptions, total=False):
    """Options of every data module; :class:`DataModule` describes them."""

    max_length: int


class DataModule(LightningDataModule):
    """Loaders over rows that :meth:`load` brings.

    Args:
        tokenizer: A fast tokenizer of transformers; None takes ``tokenizer`` of the trainer's LightningModule.
        batch_size: Rows in a batch of one rank.
        val_batch_size: The same for validation; None means ``batch_size``.
        max_length: In tokens; longer rows are cut at the right.
        num_workers: Processes that put batches together; 0 does it in the training process.
        seed: Of the split and of the order of rows.
        samples: The number of fixed prompts.
        group_by_length: Put rows of like length into a batch, which saves padding.
        pad_to_multiple_of: Round the length of batches up to a multiple of this.
        cache: Keep tokenised rows on disk, for further runs and all processes of this one; a path is the folder.

    Raises:
        LoraConfigError: If an option makes no sense.
    """

    def __init__(
        self,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        batch_size: int = 4,
        val_batch_size: int | None = None,
        max_length: int = 512,
        num_workers: int = 0,
        seed: int = 0,
        samples: int = 3,
        group_by_length: bool = True,
        pad_to_multiple_of: int | None = None,
        cache: bool | str = False,
    ) -> None:
        super().__init__()
        least = {
            "batch_size": (batch_size, 1),
            "val_batch_size": (1 if val_batch_size is None else val_batch_size, 1),
            "max_length": (max_length, 2),
            "num_workers": (num_workers, 0),
            "samples": (samples, 0),
            "pad_to_multiple_of": (1 if pad_to_multiple_of is None else pad_to_multiple_of, 1),
        }
        if wrong := [
            f"{name} must be at least {low}, got {given!r}" for name, (given, low) in least.items() if given < low
        ]:
            raise LoraConfigError("; ".join(wrong) + ".")
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.val_batch_size = val_batch_size or batch_size
        self.max_length = max_length
        self.num_workers = num_workers
        self.seed = seed
        self.samples = samples
        self.group_by_length = group_by_length
        self.pad_to_multiple_of = pad_to_multiple_of
        self.cache = cache
        self.packing = False
        self._loaded: Loaded | None = None
        self._told = False

    @abstractmethod
    def load(self, tokenizer: PreTrainedTokenizerBase) -> Loaded:
        """Reads, splits and tokenises the rows; called once, on every rank.

        Args:
            tokenizer: That of the model.
        """

    def prepare_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        """Makes a tokenizer what the rows need.

        Args:
            tokenizer: That of the model, changed in place.

        Returns:
            Notes for people.
        """
        return []

    def content(self) -> object:
        """All that the rows are made of beside the options and the tokenizer, fit for JSON: digests of files, say.

        Raises:
            LoraConfigError: Here: what a subclass does not say, nobody knows.
        """
        raise LoraConfigError(
            f"{type(self).__name__} does not say what its rows are made of, so it cannot be told whether cached ones "
            "are still right: write its method `content`, or set data.cache=false."
        )

    def setup(self, stage: str | None = None) -> None:
        """Loads the rows, once; before training, rank zero tells what they are.

        Raises:
            LoraConfigError: If there is no tokenizer, or something is wrong with the rows.
        """
        if self._loaded is None:
            tokenizer = self._find_tokenizer()
            self._loaded = load_cached(self, tokenizer) if self.cache else self.load(tokenizer)
        if stage == "fit" and not self._told and rank_and_world()[0] == 0:
            Console().print(self.describe())
            self._told = True

    def take(self, loaded: Loaded) -> None:
        """Have the rows that another data module of the same settings has loaded; :meth:`setup` then loads none.

        Args:
            loaded: Its :attr:`loaded`. Both only read it, so it must not be a stream.
        """
        self._loaded = loaded

    def keep_quiet(self) -> None:
        """Tell nothing of the rows before training."""
        self._told = True

    def train_dataloader(self) -> ResumableLoader:
        """Shuffled batches, the same for the same seed, epoch and number of ranks."""
        train, (rank, world) = self.loaded.train, self._share()
        rows: Dataset = train
        sampler: DistributedSampler | None = None
        if isinstance(train, RowStream):
            train.rank, train.world = rank, world
        elif self.packing:
            rows = PackedRows(train.examples)
            sampler = PackingSampler(train.lengths(), self.max_length, seed=self.seed, rank=rank, world=world)
        else:
            sampler = LengthGroupedSampler(
                train.lengths() if self.group_by_length else None,
                len(train),
                batch_size=self.batch_size,
                seed=self.seed,
                rank=rank,
                world=world,
            )
        return ResumableLoader(
            rows,
            batch_size=self.batch_size,
            sampler=sampler,
            collate_fn=self._collator(packed=self.packing),
            trainer=self.trainer,
            **loader_options(self.num_workers, self.seed),
        )

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        """The validation rows in order, each once over all ranks; no loader where there are none."""
        rows, (rank, world) = self.loaded.validation, self._share()
        if not len(rows):
            return []
        return DataLoader(
            rows,
            batch_size=self.val_batch_size,
            sampler=ShardSampler(len(rows), rank=rank, world=world),
            collate_fn=self._collator(),
            **loader_options(self.num_workers, self.seed),
        )

    def test_dataloader(self) -> DataLoader | list[DataLoader]:
        """The validation rows: nothing is chosen by them unless a callback of yours does."""
        return self.val_dataloader()

    def sample_prompts(self) -> list[SamplePrompt]:
        """The fixed prompts, from rows for validation where there are any."""
        return self.loaded.prompts

    def describe(self) -> RenderableType:
        """One example with its trained tokens marked, and what became of the rows."""
        train, notes = self.loaded.train, self.loaded.notes
        if self.packing and not isinstance(train, RowStream):
            notes = [*notes, how_full(train.lengths(), self.max_length)]
        return summary(self.loaded.tallies, notes, *self.preview(self.loaded.shown))

    def preview(self, example: Example) -> tuple[RenderableType, str]:
        """How an example is shown, and the title over it.

        Args:
            example: ``input_ids`` and ``labels``, (T,) each.
        """
        return marked(example, self._find_tokenizer()), "One training example; trained is what stands between ⟦ and ⟧"

    @property
    def loaded(self) -> Loaded:
        """What :meth:`setup` loaded.

        Raises:
            RuntimeError: Before setup.
        """
        if self._loaded is None:
            raise RuntimeError(f"{type(self).__name__} has no rows yet: call setup('fit') first.")
        return self._loaded

    def _share(self) -> tuple[int, int]:
        """Which share of the rows this process gets, of how many: tensor-parallel processes get the same rows."""
        rank, world = rank_and_world()
        told = None if self.trainer is None or world == 1 else self.trainer.distributed_sampler_kwargs
        return (told["rank"], told["num_replicas"]) if told else (rank, world)

    def _find_tokenizer(self) -> PreTrainedTokenizerBase:
        if self.tokenizer is None and self.trainer is not None:
            self.tokenizer = getattr(self.trainer.lightning_module, "tokenizer", None)
        if self.tokenizer is None:
            raise LoraConfigError(
                f"{type(self).__name__} has no tokenizer: give it `tokenizer=`, or a LightningModule with `.tokenizer`."
            )
        return self.tokenizer

    def _collator(self, *, packed: bool = False) -> Collator | PackingCollator:
        tokenizer = self._find_tokenizer()
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        return (PackingCollator if packed else Collator)(pad or 0, self.pad_to_multiple_of)
