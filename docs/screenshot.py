"""Makes docs/images/tensorboard.png: TensorBoard's page of diagnostics, as a headless Chromium shows it.

lightning-optim fit && python docs/screenshot.py runs/digits
"""

import argparse
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

IMAGE = Path(__file__).parent / "images" / "tensorboard.png"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("logdir", help="folder of TensorBoard logs")
    parser.add_argument("--out", default=str(IMAGE), help="image file")
    parser.add_argument("--browser", default="chromium", help="Chromium or Chrome")
    parser.add_argument("--size", default="1500,2050", help="width and height of the window")
    options = parser.parse_args()
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    board = [sys.executable, "-m", "tensorboard.main", "--logdir", options.logdir, "--port", str(port)]
    server = subprocess.Popen(board, stderr=subprocess.DEVNULL)
    try:
        _wait_for(f"http://localhost:{port}/data/runs")
        time.sleep(5)  # until the logs are read
        with tempfile.TemporaryDirectory() as profile:
            flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
            page = f"http://localhost:{port}/?darkMode=false#custom_scalars"
            subprocess.run(
                [
                    options.browser, *flags, f"--user-data-dir={profile}", f"--window-size={options.size}",
                    "--virtual-time-budget=30000", f"--screenshot={options.out}", page,
                ],
                check=True,
                stderr=subprocess.DEVNULL,
            )  # fmt: skip
    finally:
        server.terminate()
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
