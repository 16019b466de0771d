"""EfficientNet-Lite0 for ImageNet-sized images, of torchvision's EfficientNet layers."""

from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.efficientnet import EfficientNet, MBConv, MBConvConfig

from lab.models.small_images import check_image_size, fit_channels


class SamePadConv2d(nn.Conv2d):
    """A convolution whose output has ceil(size / stride) pixels.

    An odd number of padded pixels puts the additional one at the bottom and right, as TensorFlow's
    padding "SAME" does: an image of even size is not padded at the top and left by a 3x3 kernel of
    stride 2.
    """

    def forward(self, images: Tensor) -> Tensor:
        """Return the convolution of images [n, C, H, W]."""
        padding = []
        for size, kernel, stride in zip(
            images.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True
        ):
            total = max(kernel - (size % stride or stride), 0)
            padding += [total // 2, total - total // 2]  # F.pad expects the width first
        return self._conv_forward(F.pad(images, padding), self.weight, self.bias)


def efficientnet_lite0(num_classes: int, in_chans: int, image_size: int) -> nn.Module:
    """EfficientNet-Lite0 (Liu 2020, "Higher accuracy on vision models with EfficientNet-Lite"):
    EfficientNet-B0 (Tan, Le 2019, table 1) without squeeze-and-excitation, and with ReLU6.

    Made for images of 224 pixels: the strides are the same at any size, and padding is
    TensorFlow's, as ImageNet weights from there expect it. At 32 pixels, 3 channels and 10 classes:
    7,847,648 multiply-adds; 3,383,818 parameters. At 224 pixels and 1000 classes: 385,187,552
    multiply-adds; 4,652,008 parameters.
    """
    check_image_size("efficientnet_lite0", image_size, 32)
    block = partial(MBConvConfig, block=partial(MBConv, se_layer=nn.Identity))
    stages = [  # expansion, kernel, stride, channels in, channels out, blocks
        block(1, 3, 1, 32, 16, 1),
        block(6, 3, 2, 16, 24, 2),
        block(6, 5, 2, 24, 40, 2),
        block(6, 3, 2, 40, 80, 3),
        block(6, 5, 1, 80, 112, 3),
        block(6, 5, 2, 112, 192, 4),
        block(6, 3, 1, 192, 320, 1),
    ]
    norm_layer = partial(nn.BatchNorm2d, eps=1e-3)
    model = EfficientNet(stages, dropout=0.2, num_classes=num_classes, norm_layer=norm_layer)
    nn.init.normal_(model.classifier[1].weight, std=0.01)  # see small_images.efficientnet
    fit_channels(model, in_chans)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.SiLU):
            model.set_submodule(name, nn.ReLU6(inplace=True))
        elif isinstance(module, nn.Conv2d) and module.stride == (2, 2):
            same = SamePadConv2d(
                module.in_channels,
                module.out_channels,
                module.kernel_size[0],
                stride=2,
                groups=module.groups,
                bias=False,
            )
            same.weight = module.weight
            model.set_submodule(name, same)
    return model
