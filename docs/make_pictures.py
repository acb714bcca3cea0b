"""Draws the documentation's pictures from the synthetic phantom: `python -m docs.make_pictures`.

Reads the phantom of deploy/hospital with the bundled Triton, as `wetread process` does, and keeps the key image of
its lesion and a screenshot of the draft (Chromium where it is installed). Never from a real study: what is in
this folder is published.
"""

import json
import shutil
import subprocess
import tempfile
from pathlib import Path

from PIL import Image

from deploy.hospital.chart import chart_bundle
from deploy.hospital.phantom import PhantomSpec
from deploy.hospital.phantom_dicom import write_phantom
from middleware.process import Request, run_process
from middleware.settings import Settings

PICTURES = Path(__file__).parent / "pictures"
COLOURS = 64
"""Of a page's palette."""
JPEG_QUALITY = 90


def main() -> None:
    """Read the phantom and write the pictures."""
    PICTURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="wetread-pictures-") as name:
        folder = Path(name)
        spec = PhantomSpec()
        images = write_phantom(spec, folder / "phantom")
        context = folder / "context.json"
        context.write_text(json.dumps(chart_bundle(spec)))
        result = run_process(Settings(data_dir=folder / "data"), Request(str(images), folder / "out", context))
        if result.exit_code:
            raise SystemExit(f"the phantom was not read: {result.state}: {result.reasons}")
        key_image = Image.open(folder / "out" / "key-images" / "lesion-1.png").convert("RGB")
        narrow(key_image, 1100).save(PICTURES / "key-image.jpg", quality=JPEG_QUALITY, subsampling=0)
        screenshot(folder / "out" / "report.html", folder / "draft.png")
        draft = Image.open(folder / "draft.png").convert("RGB")
        draft.quantize(COLOURS).save(PICTURES / "draft.png", optimize=True)


def narrow(image: Image.Image, width_px: int) -> Image.Image:
    """The image, scaled down to `width_px`."""
    return image.resize((width_px, round(image.height * width_px / image.width)), Image.Resampling.LANCZOS)


def screenshot(page: Path, target: Path) -> None:
    """The top of the page as Chromium shows it."""
    chromium = shutil.which("chromium")
    if chromium is None:
        raise SystemExit("chromium is not installed: apt-get install chromium")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=900,1150"]
    quiet = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"]
    command = [chromium, *options, *quiet, f"--screenshot={target}", page.as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=60)


if __name__ == "__main__":
    main()
