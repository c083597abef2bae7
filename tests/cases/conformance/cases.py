"""Every case of the conformance suite."""

from conformance.image_models import IMAGE_MODELS
from conformance.other_models import OTHER_MODELS
from conformance.video_models import VIDEO_MODELS

CASES = VIDEO_MODELS + IMAGE_MODELS + OTHER_MODELS
