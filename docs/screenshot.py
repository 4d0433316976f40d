"""Makes images of docs/images: TensorBoard's page of diagnostics, or a report, as a headless Chromium shows it.

lightning-optim fit && python docs/screenshot.py runs/digits
lightning-optim compare && python docs/screenshot.py comparisons/digits/report.html --size 1150,1130
"""

import argparse
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

IMAGES = Path(__file__).parent / "images"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("logdir", help="folder of TensorBoard logs, or an HTML page")
    parser.add_argument("--out", help="image file (default: in docs/images)")
    parser.add_argument("--browser", default="chromium", help="Chromium or Chrome")
    parser.add_argument("--size", default="1500,2050", help="width and height of the window")
    options = parser.parse_args()
    if options.logdir.endswith(".html"):
        options.out = options.out or str(IMAGES / "compare.png")
        _shoot(options, Path(options.logdir).resolve().as_uri())
        return
    options.out = options.out or str(IMAGES / "tensorboard.png")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    board = [sys.executable, "-m", "tensorboard.main", "--logdir", options.logdir, "--port", str(port)]
    server = subprocess.Popen(board, stderr=subprocess.DEVNULL)
    try:
        _wait_for(f"http://localhost:{port}/data/runs")
        time.sleep(5)  # until the logs are read
        _shoot(options, f"http://localhost:{port}/?darkMode=false#custom_scalars")
    finally:
        server.terminate()


def _shoot(options: argparse.Namespace, page: str) -> None:
    with tempfile.TemporaryDirectory() as profile:
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
        subprocess.run(
            [
                options.browser, *flags, f"--user-data-dir={profile}", f"--window-size={options.size}",
                "--virtual-time-budget=30000", f"--screenshot={options.out}", page,
            ],
            check=True,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
    print(options.out)


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
