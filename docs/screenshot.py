"""Makes the pictures of docs/images that show runs: TensorBoard's pages and a report, by a headless Chromium.

python docs/screenshot.py                    makes six runs of three optimizers first, in a temporary folder
python docs/screenshot.py --logdir runs      shows runs that are there
python docs/screenshot.py --only compare     shows the report that lightning-optim compare has written
"""

from __future__ import annotations

import argparse
import io
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

COMMAND = str(Path(sys.executable).with_name("lightning-optim"))
IMAGES = Path(__file__).parent / "images"
RUNS = [
    ("MVNGrad", ("0.001", "0.003")),
    ("NAMO", ("0.003", "0.01")),
    ("AdamW", ("0.001", "0.03")),
]
#: Pages of TensorBoard with the sizes of their windows.
BOARD = {
    "tensorboard": ("custom_scalars", "1500,1750"),
    "tensorboard-hparams": ("hparams", "1500,620"),
    "tensorboard-images": ("images", "1500,1100"),
}
REPORT_SIZE = "1150,2600"
SPIKE = ["--optimizers", "MVNGrad", "AdamW", "Muon", "SGD", "--after", "100"]
COMPARISON, COMPARISON_SIZE = Path("comparisons/digits/report.html"), "1150,1130"
PICTURES = [*BOARD, "report", "spike"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--logdir", type=Path, help="folder of TensorBoard logs; default: six runs are made")
    parser.add_argument("--out", type=Path, default=IMAGES, help="folder of the images")
    parser.add_argument("--browser", default="chromium", help="Chromium or Chrome")
    parser.add_argument("--only", nargs="+", choices=[*PICTURES, "compare"], default=PICTURES)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        logdir = options.logdir
        if "compare" in options.only:
            shoot(options.browser, COMPARISON.resolve().as_uri(), COMPARISON_SIZE, options.out / "compare.png")
        if logdir is None and set(options.only) - {"spike", "compare"}:
            logdir = Path(folder) / "runs"
            make_runs(logdir)
        if set(options.only) & set(BOARD):
            with tensorboard(logdir) as address:
                for name in set(options.only) & set(BOARD):
                    page, size = BOARD[name]
                    shoot(options.browser, f"{address}/?darkMode=false#{page}", size, options.out / f"{name}.png")
        if "report" in options.only:
            page = Path(folder) / "report.html"
            command = [COMMAND, "diagnostics", str(logdir), "--out", str(page)]
            subprocess.run(command, check=True)
            shoot(options.browser, page.resolve().as_uri(), REPORT_SIZE, options.out / "report.png")
        if "spike" in options.only:
            figure = Path(folder) / "spike.png"
            subprocess.run([COMMAND, "spike", *SPIKE, "--out", str(figure)], check=True, stdout=subprocess.DEVNULL)
            save(figure, options.out / "spike.png")


def make_runs(root: Path) -> None:
    """Six short runs on digits."""
    for optimizer, rates in RUNS:
        for lr in rates:
            choice = ["--optimizer", optimizer, "--optimizer.lr", lr, "--trainer.default_root_dir", str(root)]
            run = ["--trainer.max_epochs", "8", "--diagnostics.every_n_steps", "5", "--trainer.log_every_n_steps", "5"]
            quiet = ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
            small = ["--model.backbone_args", "{channels: [8, 16, 32, 64], stem_width: 8}"]
            fit = [COMMAND, "fit", *choice, *run, *quiet, *small]
            subprocess.run(fit, check=True, stdout=subprocess.DEVNULL)


@contextmanager
def tensorboard(logdir: Path) -> Iterator[str]:
    """Serve a folder of logs while this lasts. Yields the address."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    board = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logdir), "--port", str(port)]
    server = subprocess.Popen(board, stderr=subprocess.DEVNULL)
    try:
        _wait_for(f"http://localhost:{port}/data/runs")
        time.sleep(5)  # until the logs are read
        yield f"http://localhost:{port}"
    finally:
        server.terminate()
        server.wait()


def shoot(browser: str, page: str, size: str, image: Path) -> None:
    """Write what a page looks like."""
    with tempfile.TemporaryDirectory() as folder:
        shot = Path(folder) / "page.png"
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
        subprocess.run(
            [
                browser, *flags, f"--user-data-dir={folder}/profile", f"--window-size={size}",
                "--virtual-time-budget=30000", f"--screenshot={shot}", page,
            ],
            check=True,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        save(shot, image)


def save(shot: Path, image: Path) -> None:
    """Write a picture in 64 colours: a fifth of the size, and no difference to the eye."""
    content = io.BytesIO()
    Image.open(shot).convert("RGB").quantize(64).save(content, "PNG", optimize=True)
    image.write_bytes(content.getvalue())
    print(image)


def _wait_for(url: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            urllib.request.urlopen(url)
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


if __name__ == "__main__":
    main()
