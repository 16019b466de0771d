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

    def __init__(self, num_classes: int, in_chans: int, image_size: int):
        super().__init__()
        if image_size < 28:
            raise UserError(f"lenet5 cannot take images of {image_size} pixels", "Give 28 or more")
        # Fewer pixels are padded to the paper's 32; the shapes below are for 28 and 32.
        padding = max(0, (33 - image_size) // 2)
        self.features = nn.Sequential(
            nn.Conv2d(in_chans, 6, 5, padding=padding),  # [n, 6, 28, 28]
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
