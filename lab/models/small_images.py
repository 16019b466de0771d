"""torchvision's models, adapted to small images.

Below 64 pixels, strides that were designed for 224 pixels would reduce the feature map to one
pixel. Each function documents what it changes for these small images, and the multiply-adds of a
forward pass of one image of 32 pixels, for 10 classes and 3 channels. From 64 pixels on, the models
are torchvision's. Parameters keep torchvision's names, so that its ImageNet weights can be loaded.
"""

from torch import nn
from torchvision import models
from torchvision.models.vision_transformer import ConvStemConfig, VisionTransformer

from lab.errors import UserError

MIN_UNCHANGED_SIZE = 64  # pixels; larger images need no other strides


class GoogLeNet(models.GoogLeNet):
    """torchvision's GoogLeNet with the weight of its auxiliary losses.

    In training mode it returns the logits [n, K] and those of the two auxiliary classifiers.
    """

    auxiliary_weight = 0.3  # of each auxiliary loss (Szegedy et al. 2015, section 5)


def googlenet(num_classes: int, in_chans: int, image_size: int) -> nn.Module:
    """GoogLeNet (Szegedy et al. 2015, "Going Deeper with Convolutions", table 1), with BatchNorm.

    Small images: the first convolution is 3x3 with stride 1, not 7x7 with stride 2, and no pooling
    follows it. The later poolings stay, so that the Inception stages have maps of 16, 8 and 4
    pixels. 452,175,872 multiply-adds; 9,952,958 parameters, 4,350,484 of them in the two auxiliary
    classifiers, which are only used in training.
    """
    check_image_size("googlenet", image_size, 16)
    model = GoogLeNet(num_classes=num_classes, init_weights=True)
    if image_size < MIN_UNCHANGED_SIZE:
        model.maxpool1 = nn.Identity()
    return fit_first(model, in_chans, image_size)


def densenet(num_classes: int, in_chans: int, image_size: int) -> nn.Module:
    """DenseNet-BC, 100 layers, growth rate 12 (Huang et al. 2017, "Densely Connected Convolutional
    Networks", section 3, "Implementation Details"; table 2).

    Three dense blocks of 16 bottleneck layers, designed for 32 pixels, built of torchvision's
    layers. Small images: the paper's 3x3 first convolution of 24 filters, without BatchNorm, ReLU
    and pooling after it; the blocks have maps of 32, 16 and 8 pixels. 287,929,692 multiply-adds;
    769,162 parameters.
    """
    check_image_size("densenet", image_size, 16)
    blocks: tuple = (16, 16, 16)
    model = models.DenseNet(12, blocks, num_init_features=24, num_classes=num_classes)
    if image_size < MIN_UNCHANGED_SIZE:
        model.features.norm0 = model.features.relu0 = nn.Identity()
    return fit_densenet(model, in_chans, image_size)


def densenet121(num_classes: int, in_chans: int, image_size: int) -> nn.Module:
    """DenseNet-121 (Huang et al. 2017, table 1).

    Small images: the first convolution is 3x3 with stride 1, not 7x7 with stride 2, and no pooling
    follows it; the blocks have maps of 32, 16, 8 and 4 pixels. 888,350,720 multiply-adds;
    6,956,426 parameters.
    """
    check_image_size("densenet121", image_size, 16)
    model = models.densenet121(num_classes=num_classes)
    return fit_densenet(model, in_chans, image_size)


def fit_densenet(model: models.DenseNet, in_chans: int, image_size: int) -> nn.Module:
    """Return the model without its first pooling if images are small."""
    if image_size < MIN_UNCHANGED_SIZE:
        model.features.pool0 = nn.Identity()
    return fit_first(model, in_chans, image_size)


def mobilenet(num_classes: int, in_chans: int, image_size: int) -> nn.Module:
    """MobileNetV2 (Sandler et al. 2018, "MobileNetV2: Inverted Residuals and Linear Bottlenecks",
    table 2).

    Small images: the first convolution and the first of the blocks with stride 2 have stride 1;
    the last map has 4x4 pixels. 87,976,448 multiply-adds; 2,236,682 parameters.
    """
    check_image_size("mobilenet_v2", image_size, 16)
    model = models.mobilenet_v2(num_classes=num_classes)
    keep_resolution(image_size, model.features[0], model.features[2])
    return fit_first(model, in_chans, image_size)


def mobilenet_v3(num_classes: int, in_chans: int, image_size: int) -> nn.Module:
    """MobileNetV3-Small (Howard et al. 2019, "Searching for MobileNetV3", table 2).

    Small images: the first convolution and the first block have stride 1, not 2; the last map has
    4x4 pixels. BatchNorm's momentum: see `set_momentum`. 17,507,328 multiply-adds; 1,528,106
    parameters.
    """
    check_image_size("mobilenet_v3_small", image_size, 16)
    model = models.mobilenet_v3_small(num_classes=num_classes)
    keep_resolution(image_size, model.features[0], model.features[1])
    set_momentum(model)
    return fit_first(model, in_chans, image_size)


def efficientnet(num_classes: int, in_chans: int, image_size: int, variant: str) -> nn.Module:
    """EfficientNet B0 to B7 (Tan, Le 2019, "EfficientNet: Rethinking Model Scaling for
    Convolutional Neural Networks"): table 1 is B0, which section 3.3 scales in width and depth.

    The paper scales the image, too; use `--image-size`. Small images: the first convolution and the
    first stage with stride 2 have stride 1; the last map has 4x4 pixels. BatchNorm's momentum: see
    `set_momentum`. The classifier is initialized like MobileNet's, normal with deviation 0.01:
    torchvision's deviation grows with fewer classes, and for 10 the first loss would be 4.4.

    B0: 116,167,168 multiply-adds; 4,020,358 parameters.
    B1: 175,290,880 multiply-adds; 6,525,994 parameters.
    B2: 204,551,616 multiply-adds; 7,715,084 parameters.
    B3: 294,697,280 multiply-adds; 10,711,602 parameters.
    B4: 470,642,528 multiply-adds; 17,566,546 parameters.
    B5: 747,958,080 multiply-adds; 28,361,274 parameters.
    B6: 1,062,872,928 multiply-adds; 40,758,754 parameters.
    B7: 1,650,988,032 multiply-adds; 63,812,570 parameters.
    """
    check_image_size(f"efficientnet_{variant}", image_size, 16)
    model = models.get_model(f"efficientnet_{variant}", num_classes=num_classes)
    keep_resolution(image_size, model.features[0], model.features[2])
    set_momentum(model)
    nn.init.normal_(model.classifier[1].weight, std=0.01)
    return fit_first(model, in_chans, image_size)


def vit_tiny(num_classes: int, in_chans: int, image_size: int) -> nn.Module:
    """ViT-Tiny: 12 layers, 192 wide, 3 heads (Touvron et al. 2021, "Training data-efficient image
    transformers", table 1), the model of Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words",
    section 3.1.

    Patches of 4x4 pixels in small images and of 16x16 from 64 pixels on, a class token, and learned
    position embeddings. Small images: 365,107,584 multiply-adds; 5,362,762 parameters.
    """
    return vision_transformer("vit_tiny", 192, num_classes, in_chans, image_size)


def vit_small(num_classes: int, in_chans: int, image_size: int) -> nn.Module:
    """ViT-Small: 12 layers, 384 wide, 6 heads (Touvron et al. 2021, table 1); otherwise ViT-Tiny.

    Small images: 1,420,309,248 multiply-adds; 21,342,346 parameters.
    """
    return vision_transformer("vit_small", 384, num_classes, in_chans, image_size)


def vit_hybrid(num_classes: int, in_chans: int, image_size: int) -> nn.Module:
    """ViT-Tiny with a convolutional stem (Dosovitskiy et al. 2021, section 3.1, "Hybrid
    Architecture"; Xiao et al. 2021, "Early Convolutions Help Transformers See Better", section 3):
    3x3 convolutions to 24, 48, 96 and 192 channels, then 1x1, in place of one layer.

    Small images: two of the four convolutions have stride 2 instead of all, so that a token
    represents 4x4 pixels. 353,089,536 multiply-adds; 5,164,642 parameters.
    """
    strides = (1, 2, 2, 1) if image_size < MIN_UNCHANGED_SIZE else (2, 2, 2, 2)
    stem = [ConvStemConfig(24 * 2**i, 3, stride) for i, stride in enumerate(strides)]
    return vision_transformer("vit_hybrid", 192, num_classes, in_chans, image_size, stem)


def vision_transformer(
    name: str,
    width: int,
    num_classes: int,
    in_chans: int,
    image_size: int,
    stem: list[ConvStemConfig] | None = None,
) -> nn.Module:
    """Return torchvision's transformer with heads of width 64 and an MLP ratio of 4."""
    patch = 4 if image_size < MIN_UNCHANGED_SIZE else 16
    if image_size % patch:
        lower = image_size - image_size % patch
        raise UserError(
            f"{name} cuts images into patches of {patch} pixels, but --image-size {image_size} is "
            f"not a multiple of {patch}",
            f"Give --image-size {max(patch, lower)} or {lower + patch}",
        )
    model = VisionTransformer(
        image_size,
        patch,
        num_layers=11 if stem else 12,
        num_heads=width // 64,
        hidden_dim=width,
        mlp_dim=4 * width,
        num_classes=num_classes,
        conv_stem_configs=stem,
    )
    return fit_channels(model, in_chans)


def check_image_size(name: str, image_size: int, minimum: int) -> None:
    """Raise `UserError` if images are too small for the strides of the model."""
    if image_size < minimum:
        raise UserError(
            f"{name} cannot take images of {image_size} pixels", f"Give {minimum} or more"
        )


def keep_resolution(image_size: int, *layers: nn.Module) -> None:
    """Set the stride of the layers' convolutions to 1 if images are small."""
    for layer in layers:
        for module in layer.modules():
            if isinstance(module, nn.Conv2d) and image_size < MIN_UNCHANGED_SIZE:
                module.stride = (1, 1)


def set_momentum(model: nn.Module) -> None:
    """Set BatchNorm's momentum to 0.1, PyTorch's default, at any image size.

    MobileNetV3 and EfficientNet-B5 to B7 use 0.01, for tens of thousands of steps. After the few
    hundred steps that small datasets need, the statistics would still be those of the initial
    weights, and the evaluation at chance level.
    """
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.1


def fit_first(model: nn.Module, in_chans: int, image_size: int) -> nn.Module:
    """Return the model with a first convolution for `in_chans`; 3x3, stride 1 for small images."""
    if image_size < MIN_UNCHANGED_SIZE:
        return fit_channels(model, in_chans, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))
    return fit_channels(model, in_chans)


def fit_channels(model: nn.Module, in_chans: int, **changes: tuple[int, int]) -> nn.Module:
    """Return the model, with its first convolution replaced if it differs from what is asked for.

    The new weights are normal with variance 1 / fan-in, which preserves the variance of the input
    (LeCun et al. 1998, "Efficient BackProp", section 4.6), as nearly all models normalize next.
    """
    name, first = next(
        (name, module) for name, module in model.named_modules() if isinstance(module, nn.Conv2d)
    )
    old = {key: getattr(first, key) for key in ("kernel_size", "stride", "padding")}
    if (first.in_channels, old) == (in_chans, old | changes):
        return model
    bias = first.bias is not None
    new = nn.Conv2d(in_chans, first.out_channels, bias=bias, **old | changes)
    nn.init.kaiming_normal_(new.weight, nonlinearity="linear")
    if new.bias is not None:
        nn.init.zeros_(new.bias)
    model.set_submodule(name, new)
    return model
