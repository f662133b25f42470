"""Weight Standardization (Qiao et al., 2019), fine-tuned from its authors' ImageNet weights."""


def standardize_weights(model, dataloader, train):
    """Standardize the weights before each GN of ``model``, and feed it as the authors did.

    Needs the backbone of their file (github.com/joe-siyuan-qiao/WeightStandardization), converted
    to Detectron2's names: train.init_checkpoint=FILE. Without it, training is refused.
    """
    train.init_checkpoint = ""
    model.weight_standardization = "authors"
    # As these weights were trained: RGB, and torchvision's mean and deviation
    model.input_format = dataloader.train.mapper.image_format = "RGB"
    model.pixel_mean, model.pixel_std = [123.675, 116.280, 103.530], [58.395, 57.120, 57.375]
