"""LeNet-5 and AlexNet, sized for small images."""

import torch
from torch import Tensor, nn

from lab.errors import UserError


class AveragePool(nn.AvgPool2d):
    """PyTorch's, to rounding; 2 x 2 on a CPU by two additions, which is faster there."""

    def forward(self, x: Tensor) -> Tensor:
        """[n, C, H/2, W/2] of [n, C, H, W], for a kernel of 2."""
        # Exported, it is the operator that every runtime knows.
        if self.kernel_size != 2 or x.device.type != "cpu" or torch.compiler.is_exporting():
            return super().forward(x)
        if x.shape[2] % 2 or x.shape[3] % 2:
            return super().forward(x)
        top, bottom = x.unflatten(2, (-1, 2)).unbind(3)
        left, right = (top + bottom).unflatten(3, (-1, 2)).unbind(4)
        return (left + right) / 4


class LeNet5(nn.Module):
    """LeNet-5 (LeCun et al. 1998, "Gradient-Based Learning Applied to Document Recognition", II.B).

    Full connection from S2 to C3 and plain average pooling, as is usual since. 61,706 parameters
    for 10 classes and one channel, whatever the image size.
    """

    def __init__(self, num_classes: int, channels: int, image_size: int):
        super().__init__()
        if image_size < 28:
            raise UserError(f"lenet5 cannot take images of {image_size} pixels", "Give 28 or more")
        # Fewer pixels are padded to the paper's 32; the shapes below are for 28 and 32.
        padding = max(0, (33 - image_size) // 2)
        self.features = nn.Sequential(
            nn.Conv2d(channels, 6, 5, padding=padding),  # [n, 6, 28, 28]
            nn.Tanh(),
            AveragePool(2),  # [n, 6, 14, 14]
            nn.Conv2d(6, 16, 5),  # [n, 16, 10, 10]
            nn.Tanh(),
            AveragePool(2),  # [n, 16, 5, 5]
            nn.Conv2d(16, 120, 5),  # [n, 120, 1, 1]
            nn.Tanh(),
            nn.Identity() if image_size <= 32 else nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.classifier = nn.Sequential(
            nn.Linear(120, 84),
            nn.Tanh(),
            nn.Linear(84, num_classes),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Logits [n, K] of images [n, C, H, W]."""
        return self.classifier(self.features(images))


class AlexNet(nn.Module):
    """AlexNet (Krizhevsky, Sutskever, Hinton 2012) with 3x3 kernels, for images of about 32 pixels.

    The five convolutions, three poolings and three dense layers of the paper, without its local
    response normalisation and its strides. 14,859,082 parameters for 10 classes, 3 channels.
    """

    def __init__(self, num_classes: int, channels: int, image_size: int):
        super().__init__()
        if image_size < 8:
            raise UserError(f"alexnet cannot take images of {image_size} pixels", "Give 8 or more")
        self.features = nn.Sequential(
            nn.Conv2d(channels, 64, 3, padding=1),  # [n, 64, 32, 32]
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),  # [n, 64, 16, 16]
            nn.Conv2d(64, 192, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),  # [n, 192, 8, 8]
            nn.Conv2d(192, 384, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(384, 256, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(256, 256, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),  # [n, 256, 4, 4]
            # Only where it changes something: its backward pass is not deterministic on GPUs.
            nn.Identity() if image_size // 8 == 4 else nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
        )
        self.classifier = nn.Sequential(
            nn.Dropout(0.5),
            nn.Linear(256 * 4 * 4, 2048),
            nn.ReLU(inplace=True),
            nn.Dropout(0.5),
            nn.Linear(2048, 2048),
            nn.ReLU(inplace=True),
            nn.Linear(2048, num_classes),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Logits [n, K] of images [n, C, H, W]."""
        return self.classifier(self.features(images))


@torch.no_grad()
def kaiming_init(network: nn.Module) -> None:
    """Sets weights so that activations keep their variance through ReLUs (He et al. 2015, 2.2).

    PyTorch's default draws are smaller: eight layers deep the signal is lost, and AlexNet's loss
    stays at log(10) for its first hundreds of steps.
    """
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
