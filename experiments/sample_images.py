"""A picture of images drawn pixel by pixel from a model of pixel values.

python experiments/sample_images.py --workdir=runs/mnist_axial_0 --output=samples.png
python experiments/sample_images.py --workdir=runs/mnist_mamba_0 --count=10 --temperature=0.9
"""

from __future__ import annotations

import math
import sys
import time

from absl import flags

from seqjax.training import command_line

_WORKDIR = command_line.define_workdir()
_IMPORT = command_line.define_imports()
_COUNT = flags.DEFINE_integer("count", 32, "Images to draw; a class-conditional model draws class after class.", lower_bound=1)
_TEMPERATURE = flags.DEFINE_float("temperature", 1.0, "0 takes the most likely values.", lower_bound=0.0)
_SEED = flags.DEFINE_integer("seed", 0, "Of the sampling.")
_OUTPUT = flags.DEFINE_string("output", None, "File of the picture; samples.png in the workdir by default.")


def main() -> None:
    import jax
    import numpy as np
    from PIL import Image

    import seqjax
    from seqjax.config import ConfigError
    from seqjax.data.sequential_images import BOS_ID, SequentialImages
    from seqjax.training.restore import load_workdir
    from seqjax.training.trainer import make_task

    restored = load_workdir(_WORKDIR.value)
    task = make_task(restored.config)
    if not isinstance(task, SequentialImages) or task.objective != "density":
        raise ConfigError(f"--workdir={_WORKDIR.value} holds no model of pixel values; allowed: data.objective='density'.")
    height, width, channels = task.image_shape
    first = BOS_ID + (np.arange(_COUNT.value) % 10 if task.class_conditional else np.zeros(_COUNT.value, int))
    start = time.perf_counter()
    pixels = np.asarray(
        seqjax.generate(
            restored.model,
            restored.variables,
            first[:, None].astype(np.int32),
            task.length,
            temperature=_TEMPERATURE.value,
            key=jax.random.key(_SEED.value),
        )
    )
    print(f"{_COUNT.value} images in {time.perf_counter() - start:.1f} s, compilation included")
    columns = max(1, math.isqrt(2 * _COUNT.value))
    rows = -(-_COUNT.value // columns)
    sheet = np.zeros((rows * columns, height, width, channels), np.uint8)
    sheet[: _COUNT.value] = np.minimum(pixels, 255).reshape(-1, height, width, channels)  # a beginning id is no grey level
    picture = sheet.reshape(rows, columns, height, width, channels).swapaxes(1, 2).reshape(rows * height, columns * width, -1)
    output = _OUTPUT.value or f"{_WORKDIR.value}/samples.png"
    Image.fromarray(picture.squeeze(-1) if channels == 1 else picture).resize((2 * columns * width, 2 * rows * height), 0).save(
        output
    )
    print(output)


if __name__ == "__main__":
    sys.exit(command_line.run(main))
