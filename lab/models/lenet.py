"""LeNet-5."""

from torch import Tensor, nn

from lab.errors import UserError


class LeNet5(nn.Module):
    """LeNet-5 (LeCun et al. 1998, "Gradient-Based Learning Applied to Document Recognition", II.B).

    C3 is fully connected to S2, and pooling has no weights, as is usual today. 61,706 parameters
    for 10 classes and one channel at any image size.
    """

    def __init__(self, num_classes: int, in_chans: int, image_size: int):
        super().__init__()
        if image_size < 28:
            raise UserError(f"lenet5 cannot take images of {image_size} pixels", "Give 28 or more")
        # Smaller images are padded to the paper's 32 pixels; shapes below are for 28 and 32.
        padding = max(0, (33 - image_size) // 2)
        self.features = nn.Sequential(
            nn.Conv2d(in_chans, 6, 5, padding=padding),  # [n, 6, 28, 28]
            nn.Tanh(),
            nn.AvgPool2d(2),  # [n, 6, 14, 14]
            nn.Conv2d(6, 16, 5),  # [n, 16, 10, 10]
            nn.Tanh(),
            nn.AvgPool2d(2),  # [n, 16, 5, 5]
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
        """Return logits [n, K] for images [n, C, H, W]."""
        return self.classifier(self.features(images))
