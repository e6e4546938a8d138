"""Images with a label: a directory with a folder for each class, or an .npz file."""

import concurrent.futures
import dataclasses
import pathlib
import zipfile
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError

from jlora.train import metrics
from jlora.train.config import DataOptions, EvalOptions, UserError
from jlora.train.models import Family, LoadedModel, hf
from jlora.train.tasks import base, labels
from jlora.train.tasks.base import Batch, HeldOut, Measured, Rows
from jlora.train.tasks.text import cross_entropy, measure_classes, new_leaves

_MODES = {1: "L", 3: "RGB"}  # PIL's, by channels
_SIZE = 224  # of images, where no file says it
_UNCROPPED = 384  # from this size on, processors that crop do not


class Record(NamedTuple):
    """An image, as a file or as pixels, and the number of its class."""

    name: str
    image: pathlib.Path | np.ndarray
    label: Any


@dataclasses.dataclass(frozen=True)
class Processor:
    """How an image becomes pixels [height, width, channels]; by preprocessor_config.json, where there is one.

    With `crop`, its shorter side is resized to 1 / crop of the size wanted, and the middle is cut out.
    """

    size: tuple[int, int]
    channels: int
    resample: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop: float | None = None

    @classmethod
    def of(cls, model: LoadedModel) -> "Processor":
        path = None if model.directory is None else model.directory / "preprocessor_config.json"
        source = hf.read_json(path) if path is not None and path.exists() else {}
        if source.get("do_center_crop"):
            raise UserError(f"{path}: do_center_crop is true; images are only resized here, not cropped")
        channels = model.config.channels
        values = [tuple(source.get(key) or [0.5] * channels) for key in ("image_mean", "image_std")]
        if channels not in _MODES or any(len(value) != channels for value in values):
            raise UserError(
                f"{model.name} takes images of {channels} channels, normalized by {values[0]} and {values[1]}; "
                f"built are {' and '.join(map(str, _MODES))} channels, with as many means and deviations"
            )
        size = getattr(model.config, "image_size", None) or _size(source.get("size", _SIZE), path)
        crop = source.get("crop_pct") if min(size) < _UNCROPPED else None
        return cls(size, channels, source.get("resample", Image.Resampling.BILINEAR), *values, crop)

    def pixels(self, image: pathlib.Path | np.ndarray) -> UInt8[np.ndarray, "h w c"]:
        opened = Image.fromarray(image) if isinstance(image, np.ndarray) else Image.open(image)
        with opened:
            converted = opened.convert(_MODES[self.channels])
        height, width = self.size
        if self.crop is None:
            resized = converted.resize((width, height), self.resample)
        else:
            short, sides = int(min(self.size) / self.crop), converted.size
            resized = converted.resize([int(short * side / min(sides)) for side in sides], self.resample)
            left, top = ((have - want) // 2 for have, want in zip(resized.size, (width, height), strict=True))
            resized = resized.crop((left, top, left + width, top + height))
        return np.asarray(resized).reshape(*self.size, self.channels)


def _size(given: Any, path: pathlib.Path) -> tuple[int, int]:
    """The height and the width that preprocessor_config.json asks for."""
    match given:
        case int() | {"shortest_edge": int()}:
            side = given if isinstance(given, int) else given["shortest_edge"]
            return side, side
        case {"height": int(height), "width": int(width)}:
            return height, width
    raise UserError(f"{path}: size is {given!r}; wanted a number, a height and a width, or a shortest_edge")


@dataclasses.dataclass(frozen=True)
class Pixels:
    """Images that are decoded when a batch needs them: all of a directory would fill the memory."""

    records: Sequence[Record]
    processor: Processor

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, rows: Any) -> Any:
        if isinstance(rows, slice):
            return dataclasses.replace(self, records=self.records[rows])
        return np.stack([self.processor.pixels(self.records[i].image) for i in rows])


class ImageClassification(base.Task):
    """Cross-entropy over classes of images; accuracy, F1 and Matthews' correlation."""

    name = "image-classification"
    unit = "images"
    inputs = "pixels"
    auto_class = "AutoModelForImageClassification"

    def read(self, data: DataOptions, model: str, seed: int) -> tuple[DataOptions, list[Record], list[Record]]:
        train = read_images(pathlib.Path(data.data), data.label_column)
        held_out = read_images(pathlib.Path(data.eval_data), data.label_column) if data.eval_data else []
        parts = (train, held_out)
        names, *numbers = labels.number_classes(
            *([record.label for record in part] for part in parts), data.labels, labels.checkpoint_names(model)
        )
        train, held_out = (
            [record._replace(label=int(n)) for record, n in zip(part, found, strict=True)]
            for part, found in zip(parts, numbers, strict=True)
        )
        if data.eval_data is None:
            kinds = [record.label for record in train]
            chosen = labels.split(range(len(train)), kinds, data.eval_fraction, seed)
            train, held_out = ([train[i] for i in part] for part in chosen)
        return dataclasses.replace(data, labels=names), train, held_out

    def check(self, name: str, family: Family) -> None:
        able = lambda family: base.has_head(family) and not base.reads_text(family)
        base.check_family(self, name, family, able, "see images")

    def attach(self, model: LoadedModel) -> None:
        self.processor = Processor.of(model)

    def resolve(self, data: DataOptions, model: LoadedModel) -> DataOptions:
        return data

    def known_labels(self, data: DataOptions, model: str) -> DataOptions:
        return labels.known(data, model)

    def train_fully(self, model: LoadedModel) -> tuple[str, ...]:
        return new_leaves(model)

    def encode(self, examples: Sequence[Record], data: DataOptions, model: LoadedModel) -> Rows:
        check_files(examples)
        fields = {
            "pixels": Pixels(examples, self.processor),
            "labels": np.array([record.label for record in examples], np.int32),
            "mask": np.ones(len(examples), np.float32),
        }
        return Rows(fields)

    def hold_out(
        self, examples: Sequence[Record], data: DataOptions, model: LoadedModel, options: EvalOptions
    ) -> HeldOut:
        examples = examples[: options.eval_limit]
        rows = self.encode(examples, data, model)
        shown = [data.labels[record.label] for record in examples]
        return HeldOut(rows, [record.name for record in examples], shown, data.labels)

    def outputs(self, call: base.Call, batch: Batch) -> Any:
        mean, std = (jnp.array(values, jnp.float32) for values in (self.processor.mean, self.processor.std))
        return call((batch["pixels"].astype(jnp.float32) / 255 - mean) / std)

    def loss(self, call: base.Call, batch: Batch, key: Any):
        return cross_entropy(self.outputs(call, batch), batch)

    def make_eval_step(self, apply: Callable, bind: bool = True) -> Callable:
        return base.output_step(apply, bind, self.outputs)

    def evaluate(self, step, params, held_out, batch_size, poll=lambda: None) -> Measured:
        return measure_classes(base.collect(self, step, params, held_out.rows, batch_size, poll), held_out)

    def size(self, batch: Batch) -> int:
        return batch["mask"].size

    def identity(self, rows: Rows) -> int:
        total = zlib.crc32(rows.fields["labels"])
        for record in rows.fields["pixels"].records:
            content = record.image if isinstance(record.image, np.ndarray) else record.image.read_bytes()
            total = zlib.crc32(np.ascontiguousarray(content) if isinstance(content, np.ndarray) else content, total)
        return total

    def details(self, held_out: HeldOut, measured: Measured) -> list[str]:
        return metrics.classification_table(held_out.labels, measured.answers).splitlines()

    def head(self, data: DataOptions) -> tuple[str, str]:
        return f", labels={list(data.labels)}", f", num_labels={len(data.labels)}"


def read_images(path: pathlib.Path, label_column: str) -> list[Record]:
    """The images under `path`, with their labels."""
    if path.is_dir():
        return _read_folders(path)
    if path.suffix.lower() == ".npz":
        return _read_npz(path, label_column)
    raise ValueError(
        f"{path}: --task image-classification wants a directory with a folder of images for each class, or an .npz "
        "file with `images` and `labels`"
    )


def _read_folders(root: pathlib.Path) -> list[Record]:
    known = Image.registered_extensions()
    is_image = lambda path: path.suffix.lower() in known and not path.name.startswith(".")
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    records = []
    for folder in folders:
        files = sorted(path for path in folder.rglob("*") if path.is_file() and is_image(path))
        if not files:
            raise ValueError(f"{folder} holds no image: each folder of {root} is a class")
        records += [Record(str(path.relative_to(root)), path, labels.Label(folder.name, str(path))) for path in files]
    if not records:
        raise ValueError(f"{root} has no folders: wanted one for each class, {root}/CLASS/IMAGE.png")
    return records


def _read_npz(path: pathlib.Path, label_column: str) -> list[Record]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except FileNotFoundError:
        raise FileNotFoundError(f"no data file {path}") from None
    except (zipfile.BadZipFile, EOFError, zlib.error, ValueError, OSError) as error:
        raise ValueError(f"{path} is not a whole .npz file: {error}") from error
    name = label_column if label_column in arrays else "labels"
    if "images" not in arrays or name not in arrays:
        raise ValueError(f"{path} holds {sorted(arrays)}, wanted `images` and `labels` (or --label-column)")
    images, found = arrays["images"], arrays[name]
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[-1] not in _MODES):
        raise ValueError(
            f"{path}: `images` is {images.dtype}{list(images.shape)}, wanted uint8 [N, height, width] or "
            "[N, height, width, 1 or 3]"
        )
    if found.shape != images.shape[:1] or not len(images):
        raise ValueError(
            f"{path}: {len(images)} images, and `{name}` is {list(found.shape)}: wanted one label an image"
        )
    if images.ndim == 4 and images.shape[-1] == 1:
        images = images[..., 0]
    wheres = (f"{path}, image {i}" for i in range(len(images)))
    return [
        Record(f"image {i}", image, labels.read_label(label.item(), name, where))
        for i, (image, label, where) in enumerate(zip(images, found, wheres, strict=True))
    ]


def check_files(records: Sequence[Record]) -> None:
    """Decode every file once: a broken one must not end a run in its middle."""

    def problem(record: Record) -> str | None:
        try:
            with Image.open(record.image) as image:
                image.load()
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
            return f"{record.image}: {str(error).partition(str(record.image))[0].strip(' :') or error}"
        return None

    paths = [record for record in records if isinstance(record.image, pathlib.Path)]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        problems = [found for found in pool.map(problem, paths) if found]
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise ValueError(f"{len(problems)} of {len(paths)} images cannot be read: {'; '.join(problems[:3])}{more}")
