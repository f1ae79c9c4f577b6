"""Throw files at a fitted model: ``python tests/system/fuzz_predict.py CHECKPOINT FOLDER
--files 2000 --seed 0``.

Writes odd and damaged image files and predicts each through anomalib's Engine. A file must either
be scored, with a finite score, or refused with a message that names it; then ``anomalib predict``
must score the folder of all that were scored, and refuse each of some of the others by name. Prints
how many of what were thrown; the exit code is the number of files that did neither, at most 100.
"""

import argparse
import collections
import contextlib
import io
import logging
import random
import shutil
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from anomalib.data import PredictDataset
from PIL import Image

from anomalib_sgfr import Sgfr
from tests.conftest import engine_in

_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I", "I;16", "F")
_FORMATS = {"png": "PNG", "jpg": "JPEG", "bmp": "BMP", "tif": "TIFF", "webp": "WEBP"}
_SIZES = (
    (1, 1),
    (1, 2),
    (2, 1),
    (1, 257),
    (301, 1),
    (3, 3),
    (31, 33),
    (64, 64),
    (97, 255),
    (640, 480),
)
_HUGE = ((9000, 7000), (1, 40_000), (40_000, 1))

Maker = Callable[[Path, random.Random], Path]


def _picture(size: tuple[int, int], mode: str, rng: random.Random) -> Image.Image:
    values = np.random.default_rng(rng.getrandbits(32)).integers(
        0, 256, (size[1], size[0], 3), np.uint8
    )
    picture = Image.fromarray(values)
    if mode == "I;16":
        return Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257)
    if mode in {"LA", "I", "F"}:
        return picture.convert("L").convert(mode)
    if mode == "LAB":
        return Image.frombytes("LAB", size, values.tobytes())
    return picture.convert(mode)


def _saved(stem: Path, rng: random.Random, sizes: tuple[tuple[int, int], ...] = _SIZES) -> Path:
    """An image of any size, mode and format that can be written."""
    while True:
        suffix = rng.choice(sorted(_FORMATS))
        path = stem.with_suffix("." + suffix)
        picture = _picture(rng.choice(sizes), rng.choice(_MODES), rng)
        options: dict[str, object] = {}
        if rng.random() < 0.2:
            exif = Image.Exif()
            exif[0x0112] = rng.randint(0, 12)  # orientation, also such as there are none
            options["exif"] = exif
        try:
            picture.save(path, _FORMATS[suffix], **options)
        except (OSError, ValueError):  # not every mode goes into every format
            path.unlink(missing_ok=True)
        else:
            return path


def _animated(stem: Path, rng: random.Random) -> Path:
    frames = [_picture((40, 30), "RGB", rng) for _ in range(3)]
    suffix = rng.choice(("png", "webp", "tif"))
    path = stem.with_suffix("." + suffix)
    frames[0].save(path, _FORMATS[suffix], save_all=True, append_images=frames[1:])
    return path


def _huge(stem: Path, rng: random.Random) -> Path:
    path = stem.with_suffix(".png")
    Image.new(rng.choice(("L", "RGB")), rng.choice(_HUGE), rng.randint(0, 255)).save(path)
    return path


def _cut_short(stem: Path, rng: random.Random) -> Path:
    path = _saved(stem, rng)
    content = path.read_bytes()
    path.write_bytes(content[: rng.randrange(len(content))])
    return path


def _bytes_changed(stem: Path, rng: random.Random) -> Path:
    path = _saved(stem, rng)
    content = bytearray(path.read_bytes())
    for _ in range(rng.choice((1, 3, 30, 300))):
        content[rng.randrange(min(len(content), rng.choice((64, 10**9))))] = rng.randrange(256)
    path.write_bytes(content)
    return path


def _block_gone(stem: Path, rng: random.Random) -> Path:
    path = _saved(stem, rng)
    content = bytearray(path.read_bytes())
    start = rng.randrange(len(content))
    end = start + rng.randrange(1, 4096)
    content[start:end] = rng.choice((b"", bytes(len(content[start:end])), content[start:end] * 2))
    path.write_bytes(content)
    return path


def _noise(stem: Path, rng: random.Random) -> Path:
    path = stem.with_suffix("." + rng.choice(sorted(_FORMATS)))
    path.write_bytes(rng.randbytes(rng.choice((0, 1, 8, 100, 10_000))))
    return path


def _wrong_suffix(stem: Path, rng: random.Random) -> Path:
    path = _saved(stem, rng)
    return path.rename(path.with_suffix("." + rng.choice(sorted(_FORMATS))))


def _not_an_image(stem: Path, rng: random.Random) -> Path:
    path = stem.with_suffix("." + rng.choice(sorted(_FORMATS)))
    path.write_text(
        rng.choice(("image,label\n", "<svg/>", "%PDF-1.7\n", "\x00" * 50)), encoding="utf-8"
    )
    return path


def _odd_name(stem: Path, rng: random.Random) -> Path:
    odd = rng.choice(
        ("a b", "Prüfling", "部品", "it's", "50%", "[x]", "{n}", "-dash", "a" * 120, "dot.dot")
    )
    return _saved(stem.with_name(f"{stem.name} {odd} x"), rng)


def _says_it_is_vast(stem: Path, rng: random.Random) -> Path:
    path = stem.with_suffix(".png")
    _picture((8, 8), "RGB", rng).save(path)
    content = bytearray(path.read_bytes())
    content[16:24] = rng.choice((2**31 - 1, 100_000, 30_000)).to_bytes(4, "big") * 2
    path.write_bytes(content)
    return path


_KINDS: dict[str, tuple[Maker, float]] = {
    "any size, mode and format": (_saved, 4),
    "animated": (_animated, 1),
    "huge": (_huge, 0.05),
    "cut short": (_cut_short, 3),
    "bytes changed": (_bytes_changed, 5),
    "a block gone, zeroed or doubled": (_block_gone, 3),
    "noise": (_noise, 1),
    "wrong suffix": (_wrong_suffix, 1),
    "not an image": (_not_an_image, 0.5),
    "odd name": (_odd_name, 0.5),
    "says it is vast": (_says_it_is_vast, 0.3),
}


def main() -> int:
    """Throw, and tell what came back."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path, help="new folder for the files")
    parser.add_argument("--files", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--refusals", type=int, default=10, help="refused files to give to anomalib predict as well"
    )
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    rng = random.Random(options.seed)
    thrown, scored, refused = (options.folder / name for name in ("thrown", "scored", "refused"))
    for folder in (thrown, scored, refused):
        folder.mkdir(parents=True)

    model = Sgfr.load_from_checkpoint(
        options.checkpoint, map_location="cpu", visualizer=False, evaluator=False
    )
    engine = engine_in(options.folder / "results")
    counts: dict[str, collections.Counter[str]] = {kind: collections.Counter() for kind in _KINDS}
    bad = []
    for number in range(options.files):
        kind = rng.choices(list(_KINDS), [weight for _, weight in _KINDS.values()])[0]
        path = _KINDS[kind][0](thrown / f"{number:05}", rng)
        outcome, message = _predict(engine, model, path)
        counts[kind][outcome] += 1
        if outcome == "neither":
            bad.append(path)
            print(f"NEITHER scored nor named: {path} ({kind})\n{message}", flush=True)
        else:
            shutil.move(path, (scored if outcome == "scored" else refused) / path.name)

    for kind, count in counts.items():
        print(
            f"{kind}: {count['scored']} scored, {count['refused']} refused by name,"
            f" {count['neither']} neither"
        )
    total = sum(counts.values(), collections.Counter[str]())
    print(
        f"{options.files} files: {total['scored']} scored, {total['refused']} refused by name,"
        f" {len(bad)} neither"
    )

    whole = _cli(options.checkpoint, scored, options.folder / "cli")
    print(
        f"anomalib predict on the {total['scored']} that were scored: exit code {whole.returncode}"
    )
    if whole.returncode:
        bad.append(scored)
        print(whole.stderr[-3000:])
    chosen = rng.sample(sorted(refused.iterdir()), min(options.refusals, total["refused"]))
    named = 0
    for path in chosen:
        alone = _cli(options.checkpoint, path, options.folder / "cli")
        if alone.returncode and path.name in alone.stderr.replace("\n", ""):
            named += 1
        else:
            bad.append(path)
            print(
                f"NOT named by anomalib predict: {path}, exit code"
                f" {alone.returncode}\n{alone.stderr[-3000:]}"
            )
    print(f"anomalib predict on {len(chosen)} of those refused: {named} named")
    return min(len(bad), 100)


def _predict(engine: object, model: Sgfr, path: Path) -> tuple[str, str]:
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            (found,) = engine.predict(model, dataset=PredictDataset(path))  # type: ignore[attr-defined]
    except Exception as error:  # noqa: BLE001  # which one does not matter, what it says does
        said = "".join(traceback.format_exception(error))
        return ("refused" if path.name in said else "neither"), said
    finite = bool(torch.isfinite(found.pred_score).all()) and bool(
        torch.isfinite(found.anomaly_map).all()
    )
    return ("scored" if finite else "neither"), f"score {found.pred_score}"


def _cli(checkpoint: Path, data: Path, out: Path) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("anomalib")), "predict", "--model", "Sgfr"]
    command += ["--ckpt_path", str(checkpoint), "--data", str(data), "--default_root_dir", str(out)]
    command += ["--model.visualizer", "false"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


if __name__ == "__main__":
    sys.exit(main())
