"""Takes pictures of what MLflow shows of a recipe, in Chromium, 1280 and 1920 wide.

Needs chromium, chromium-driver (Debian's packages) and `pip install selenium`, none of which sensmerge needs:

    sensmerge run configs/quickstart/recipe.yaml --store /data/store
    python docs/screenshots/take.py /data/store quickstart docs/screenshots

The pictures of these pages, `NAME.png`, are those that are 1280 wide; those that are 1920 wide, `NAME-1920.png`, are to
be looked at, and not kept.
"""

import argparse
import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlflow import MlflowClient
from PIL import Image
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

WIDTHS = {1280: "", 1920: "-1920"}
HEIGHTS = {1280: 800, 1920: 1080}
COLOURS = 128
"""Of a picture: pages have few, and the file is a third."""
PATIENCE = 30.0
"""Seconds that a page may take to show what it is to show."""
SETTINGS = """
localStorage.setItem("mlflow.assistant.fab.autoOpenedOnFirstLoad_v1", "true");
localStorage.setItem("mlflow.assistant.panelOpen_v1", "false");
"""
TIDY = """
const style = document.createElement("style");
style.textContent = ".modebar { display: none !important }";
document.head.append(style);
"""
"""Hides what people see of a chart only while they point at it."""
FOLD = """
if (location.hash.includes("compare-runs")) {
    for (const name of ["Visualizations", "Parameters"]) {
        [...document.querySelectorAll("*")].filter(one => (one.innerText || "").trim() === name).pop()?.click();
    }
}
"""
"""Of the page for comparing, what is about numbers is folded out."""
SETTLES = 4.0
"""Seconds in which charts are drawn and moved, once their page is there."""


@contextmanager
def served(store: Path) -> Iterator[str]:
    """An MLflow server of a store's database; yields its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1"]
    process = subprocess.Popen(
        [*command, "--backend-store-uri", f"sqlite:///{store}/mlflow.db"],
        env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        cwd=store,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                if time.monotonic() > deadline or process.poll() is not None:
                    raise
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


def pages(address: str, recipe: str) -> dict[str, tuple[str, str]]:
    """Return the pages of a recipe's last run by name: where they are, and a text that says that they are there."""
    client = MlflowClient(address, address)
    experiment = client.get_experiment_by_name(recipe)
    assert experiment is not None, f"{recipe}: has no runs"
    number = experiment.experiment_id
    (last, *_) = client.search_runs([number], "tags.role = 'recipe' AND attributes.status = 'FINISHED'")
    children = client.search_runs([number], f"tags.mlflow.parentRunId = '{last.info.run_id}'")
    runs = {run.info.run_name: run.info.run_id for run in children}
    best = last.data.tags["best"]
    others = [name for name, run in runs.items() if name != best and name.startswith("ta")][:2]
    compared = json.dumps([runs[name] for name in (best, *others)])
    (version, *_) = client.search_model_versions(f"name = '{recipe}' AND tags.variant = '{best}'")
    kind, page = "workflowType=machine_learning", f"{address}/#/experiments/{number}/runs"
    view = f"{page}?{kind}&viewStateShareKey=models"
    compare = f"{address}/#/compare-runs?runs={compared}&experiments={json.dumps([number])}&{kind}"
    return {
        "runs": (view, best),
        "charts": (f"{view}&compareRunsMode=CHART", "eval/mean_nor"),
        "compare": (compare, best),
        "version": (f"{address}/#/models/{recipe}/versions/{version.version}?{kind}", "Merged by"),
        "card": (f"{page}/{runs[best]}/artifacts/README.md?{kind}", "Scores"),
    }


@contextmanager
def browser(address: str, width: int) -> Iterator[webdriver.Chrome]:
    """A Chromium whose pages are so wide, and which has been at MLflow before: its assistant is closed."""
    options = webdriver.ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    for flag in ("--headless=new", "--no-sandbox", "--hide-scrollbars", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options, Service("/usr/bin/chromedriver"))
    try:
        size = {"width": width, "height": HEIGHTS[width], "deviceScaleFactor": 1, "mobile": False}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        driver.get(address)
        driver.execute_script(SETTINGS)
        yield driver
    finally:
        driver.quit()


def take(driver: webdriver.Chrome, url: str, shows: str) -> Image.Image:
    """Return the picture of a page as soon as it shows a text."""
    driver.get("about:blank")  # or the next address, of which only what is behind # differs, loads nothing
    driver.get(url)
    deadline = time.monotonic() + PATIENCE
    while shows not in driver.execute_script("return document.body.innerText"):
        if time.monotonic() > deadline:
            sys.stderr.write(f"{url}: does not show {shows!r}\n")
            break
        time.sleep(0.5)
    driver.execute_script(TIDY)
    time.sleep(SETTLES)
    driver.execute_script(FOLD)
    time.sleep(1)
    return Image.open(io.BytesIO(driver.get_screenshot_as_png()))


def main() -> None:
    """Take all pictures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("store", type=Path, help="folder with mlflow.db")
    parser.add_argument("recipe", help="its name")
    parser.add_argument("target", type=Path, help="folder of the pictures")
    parser.add_argument("--only", nargs="*", help="names of the pictures to take")
    arguments = parser.parse_args()
    with served(arguments.store.resolve()) as address:
        found = pages(address, arguments.recipe)
        for width, ending in WIDTHS.items():
            with browser(address, width) as driver:
                for name, (url, shows) in found.items():
                    if arguments.only and name not in arguments.only:
                        continue
                    picture = take(driver, url, shows).convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
                    path = arguments.target / f"{name}{ending}.png"
                    picture.save(path, optimize=True)
                    sys.stdout.write(f"{path}: {path.stat().st_size // 1000} kB\n")


if __name__ == "__main__":
    main()
