"""Every unusual image is either stored as an upright RGB JPEG or refused, each time with the reason."""

import io
import struct
import zlib

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from pipeline.data.images.intake import Accepted, IntakePolicy, Refused, accept_image, dhash64

LIMITS = IntakePolicy(image_max_short_side=64, image_max_pixels=1_000_000)


def gradient(width=48, height=32):
    """Smooth, so that JPEG keeps it to a few grey levels; red grows to the right, green downwards."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, np.full_like(x, 80)], axis=-1).astype(np.uint8))


def encoded(image, kind="JPEG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(accepted):
    assert isinstance(accepted, Accepted), accepted
    result = simplejpeg.decode_jpeg(accepted.data, strict=True).astype(int)  # what training will do
    assert result.shape == (accepted.height, accepted.width, 3)
    return result


def differ(accepted, image):
    """Largest mean difference of a channel: JPEG at quality 95 stays under 1 here; clipped or turned pixels exceed 20."""
    return np.abs(pixels(accepted) - np.asarray(image.convert("RGB"), dtype=int)).mean(axis=(0, 1)).max()


@pytest.mark.parametrize("progressive", [False, True])
def test_an_upright_rgb_jpeg_keeps_its_bytes(progressive):
    data = encoded(gradient(), quality=80, progressive=progressive)
    accepted = accept_image(data, LIMITS)
    assert (accepted.data, accepted.policy) == (data, "kept")
    assert (accepted.width, accepted.height, accepted.original_width, accepted.original_height) == (48, 32, 48, 32)


def test_exif_is_applied():
    image = gradient()
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was on its side: rotate clockwise to show it
    accepted = accept_image(encoded(image, exif=exif, quality=95), LIMITS)
    assert accepted.policy == "reencoded:exif"
    assert (accepted.width, accepted.height) == (32, 48)
    assert differ(accepted, image.transpose(Image.Transpose.ROTATE_270)) < 2
    assert 0x0112 not in Image.open(io.BytesIO(accepted.data)).getexif()


def test_exif_of_a_tiff_is_applied_once():
    image = gradient()
    accepted = accept_image(encoded(image, "TIFF", tiffinfo={274: 6}), LIMITS)
    assert accepted.policy == "reencoded:tiff,exif"
    assert differ(accepted, image.transpose(Image.Transpose.ROTATE_270)) < 2


def test_damaged_exif_does_not_cost_the_image():
    data = encoded(gradient(), exif=b"Exif\0\0garbage that is no TIFF header")
    assert accept_image(data, LIMITS).policy == "kept"


def test_cmyk():
    cmyk = gradient().convert("CMYK")
    accepted = accept_image(encoded(cmyk, quality=95), LIMITS)
    assert accepted.policy == "reencoded:cmyk"
    assert differ(accepted, gradient()) < 3
    assert simplejpeg.decode_jpeg_header(accepted.data)[3] == "444"


def test_grayscale():
    grey = gradient().convert("L")
    accepted = accept_image(encoded(grey), LIMITS)
    assert accepted.policy == "reencoded:grayscale"
    assert differ(accepted, grey) < 3


def test_sixteen_bit_is_scaled_not_clipped():
    ramp = np.tile(np.linspace(0, 65535, 48).astype(np.uint16), (32, 1))
    accepted = accept_image(encoded(Image.fromarray(ramp), "PNG"), LIMITS)
    assert accepted.policy == "reencoded:png,16bit,grayscale"
    middle = pixels(accepted)[16, :, 0]
    np.testing.assert_allclose(middle, np.linspace(0, 255, 48), atol=3)


def test_sixteen_bit_colour_is_scaled_not_clipped():
    ramp = np.repeat(np.linspace(0, 65535, 48), 3).astype(">u2").tobytes()
    header = struct.pack(">IIBBBBB", 48, 32, 16, 2, 0, 0, 0)  # Pillow reads such files and cannot write them
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress((b"\0" + ramp) * 32)), (b"IEND", b"")]
    body = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    accepted = accept_image(b"\x89PNG\r\n\x1a\n" + b"".join(body), LIMITS)
    np.testing.assert_allclose(pixels(accepted)[16, :, 0], np.linspace(0, 255, 48), atol=3)


def test_sixteen_bit_with_a_wider_range_is_refused():
    values = np.array([[0, 70_000]], dtype=np.int32)
    assert accept_image(encoded(Image.fromarray(values), "TIFF"), LIMITS).reason == "unsupported"


def test_alpha_is_composited_on_white():
    image = gradient().convert("RGBA")
    image.putalpha(Image.fromarray(np.tile(np.repeat([0, 255], 24).astype(np.uint8), (32, 1))))
    accepted = accept_image(encoded(image, "PNG"), LIMITS)
    assert accepted.policy == "reencoded:png,alpha"
    assert (pixels(accepted)[:, :20] > 250).all()
    assert np.abs(pixels(accepted)[:, 30:] - np.asarray(gradient(), dtype=int)[:, 30:]).mean() < 2


def test_palette_with_transparency():
    image = Image.new("P", (32, 32), 0)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.paste(1, (16, 0, 32, 32))
    accepted = accept_image(encoded(image, "PNG", transparency=0), LIMITS)
    assert accepted.policy == "reencoded:png,palette,alpha"
    assert (pixels(accepted)[:, :8] > 250).all()  # index 0 is transparent: white, not red
    assert pixels(accepted)[16, 28].tolist() == pytest.approx([0, 0, 255], abs=4)


def test_an_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    accepted = accept_image(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), LIMITS)
    assert "animated" in accepted.policy
    assert pixels(accepted)[16, 16].tolist() == pytest.approx([255, 0, 0], abs=4)


def test_a_long_short_side_is_reduced_with_antialias():
    board = (
        np.indices((256, 512)).sum(0) % 2 * 255
    )  # one-pixel checks: without antialias they survive as black and white
    accepted = accept_image(encoded(Image.fromarray(board.astype(np.uint8)).convert("RGB"), "PNG"), LIMITS)
    assert accepted.policy == "reencoded:png,resized"
    assert (accepted.width, accepted.height, accepted.original_width, accepted.original_height) == (128, 64, 512, 256)
    assert np.abs(pixels(accepted) - 127).max() < 20


def test_a_kept_short_side_may_have_a_long_other_side():
    assert accept_image(encoded(gradient(600, 64)), LIMITS).policy == "kept"
    assert accept_image(encoded(gradient(600, 65)), LIMITS).policy == "reencoded:resized"


def test_too_many_pixels_are_refused_before_decoding():
    data = encoded(Image.new("1", (20_000, 20_000)), "PNG")
    refused = accept_image(data, IntakePolicy())
    assert refused.reason == "too_many_pixels"
    assert "20000 x 20000 = 400000000" in refused.detail
    # the same if no picture follows the header: no pixel is decoded
    assert accept_image(data[:100], IntakePolicy()).reason == "too_many_pixels"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "TIFF", "BMP", "WEBP"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_truncated_files_are_refused(kind, share):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    data = encoded(noise, kind)
    refused = accept_image(data[: int(len(data) * share)], LIMITS)
    assert isinstance(refused, Refused)
    assert refused.reason in {"truncated", "unreadable"}
    if kind == "JPEG":
        assert refused.reason == "truncated"


@pytest.mark.parametrize(
    ("data", "reason"),
    [(b"", "empty"), (b"a text file called x.jpg\n" * 50, "unreadable"), (b"\xff\xd8\xff", "unreadable")],
)
def test_no_image_is_refused(data, reason):
    refused = accept_image(data, LIMITS)
    assert refused.reason == reason
    assert "0x" not in refused.detail  # no memory address, so the text is the same in every run
    assert refused == accept_image(data, LIMITS)


def test_other_formats_pillow_knows_are_not_opened():
    assert accept_image(encoded(gradient(), "EPS"), LIMITS).reason == "unreadable"  # would start Ghostscript


def test_the_same_bytes_give_the_same_result():
    for data in (encoded(gradient()), encoded(gradient(300, 200), "PNG"), encoded(gradient().convert("CMYK"))):
        assert accept_image(data, LIMITS) == accept_image(data, LIMITS)


@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"progressive": True}, {"restart_marker_blocks": 4}])
def test_damage_is_found_wherever_the_training_reader_finds_it(options):
    """Even in the chroma, whose pixels are not computed."""
    generator = np.random.default_rng(0)
    whole = encoded(Image.fromarray(generator.integers(0, 256, (48, 48, 3), dtype=np.uint8)), quality=80, **options)
    first, refused = whole.index(b"\xff\xda") + 14, 0
    for _ in range(300):
        data = bytearray(whole)
        data[generator.integers(first, len(data) - 2)] ^= 1 << generator.integers(8)
        try:
            simplejpeg.decode_jpeg(bytes(data), "RGB", strict=True)
            reads = True
        except ValueError:
            reads = False
            refused += 1
        accepted = accept_image(bytes(data), LIMITS)
        assert reads == (isinstance(accepted, Accepted) and accepted.policy == "kept")
    assert refused > 20


def test_dhash_is_close_for_near_duplicates_and_far_for_others():
    generator = np.random.default_rng(0)
    one, other = (
        Image.fromarray(generator.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((90, 90)) for _ in range(2)
    )
    near = accept_image(encoded(one, quality=60), LIMITS).dhash64
    assert (dhash64(one) ^ near).bit_count() <= 6
    assert (dhash64(one) ^ dhash64(other)).bit_count() > 12
