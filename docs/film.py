"""
An agent's video as a short animated WebP for the documentation.

After ``make train`` and the command that it prints to film the agent:

    python docs/film.py logs/klip_ppo/Hopper-v4_1/videos/*.mp4 docs/figures/hopper.webp
"""

import sys

import imageio.v3 as iio
from PIL import Image

#: One frame in so many is kept; how many are kept at most; their width in pixels.
EVERY, FRAMES, WIDTH = 4, 200, 240


def main(video: str, film: str) -> None:
    """
    Write the film.

    :param video: file that ``rl_zoo3.record_video`` wrote
    :param film: file to write
    """
    fps = iio.immeta(video, plugin="FFMPEG")["fps"]
    kept = [frame for i, frame in enumerate(iio.imiter(video, plugin="FFMPEG")) if i % EVERY == 0][:FRAMES]
    small = [Image.fromarray(frame).resize((WIDTH, WIDTH * frame.shape[0] // frame.shape[1])) for frame in kept]
    duration = round(1000 * EVERY / fps)  # of a frame, in milliseconds
    small[0].save(film, save_all=True, append_images=small[1:], duration=duration, loop=0, quality=60, method=6)


if __name__ == "__main__":
    main(*sys.argv[1:])
