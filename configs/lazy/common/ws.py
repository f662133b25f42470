"""Weight Standardization (Qiao et al., 2019), fine-tuned from its authors' ImageNet weights."""

AUTHORS = "http://cs.jhu.edu/~syqiao/WeightStandardization"


def standardize_weights(model, dataloader, train, *, backbone="R-50"):
    """Standardize the weights before each GN of ``model``, and feed it as the authors did.

    Args:
        backbone: whose weights of theirs to start from: R-50, R-101, X-50 or X-101 (32x4d).
    """
    start_from(train, backbone)
    model.weight_standardization = "authors"
    # As these weights were trained: RGB, and torchvision's mean and deviation
    model.input_format = dataloader.train.mapper.image_format = "RGB"
    model.pixel_mean, model.pixel_std = [123.675, 116.280, 103.530], [58.395, 57.120, 57.375]


def start_from(train, backbone):
    """Start from the authors' weights of ``backbone``."""
    train.init_checkpoint = f"{AUTHORS}/{backbone}-GN-WS.pth.tar"
