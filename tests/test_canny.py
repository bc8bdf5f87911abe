"""Canny edges: the reference, the automatic thresholds, the checks."""

import numpy as np
import pytest
import skimage.data
from controlnet.preprocessors.detectors.canny import CannyOptions, auto_thresholds, canny
from controlnet.preprocessors.errors import UsageError


def test_equals_controlnet_aux():
    """On a real photo at 512 pixels, so that the reference resizes nothing."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # importing controlnet_aux warns of timm's and mediapipe's own matters
        from controlnet_aux import CannyDetector
    photo = skimage.data.astronaut()
    for low, high in ((100, 200), (30, 90)):
        theirs = CannyDetector()(photo, low, high, detect_resolution=512, image_resolution=512, output_type="np")
        ours = canny(photo, CannyOptions(low, high))
        assert ours.dtype == np.uint8 and set(np.unique(ours)) == {0, 255}
        assert np.array_equal(theirs[..., 0], ours)


def test_auto_adapts_to_contrast():
    photo = skimage.data.astronaut()
    flat = (photo // 6 + 100).astype(np.uint8)
    assert canny(flat).mean() < 0.2 * canny(photo).mean()
    assert canny(flat, CannyOptions(auto=True)).mean() > 0.5 * canny(photo, CannyOptions(auto=True)).mean()
    low, high = auto_thresholds(photo)
    assert low == round(0.4 * high)


@pytest.mark.parametrize("low, high", [(200, 100), (-1, 5), (0, 2001)])
def test_thresholds_are_checked(low, high):
    with pytest.raises(UsageError, match=f"low={low}, high={high}"):
        CannyOptions(low, high)
