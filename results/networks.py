"""Networks of docs/architectures.md: between LeNet-5 and AlexNet, and a small ViT."""

from torch import Tensor, nn
from torchvision.models import VisionTransformer

SHALLOW = (6, 16, 120)  # channels of LeNet-5's convolutions
DEEP = (4, 12, 24, 16, 16)  # a sixteenth of AlexNet's
NUM_STEM_CHANNELS = 24  # of HybridViT


class Network(nn.Module):
    """A network between LeNet-5 and AlexNet, for images of 32 pixels.

    Without arguments it is LeNet-5: three convolutions of 5x5, tanh, average pooling. `deep`
    selects AlexNet's five convolutions of 3x3 and three dense layers. `width` multiplies all
    channels: with `deep`, 16 gives those of AlexNet. Weights are initialized to preserve the
    variance of activations: Glorot, Bengio 2010 for tanh, He et al. 2015 for ReLU. Those of the
    last layer are small, so that the first loss is log(num_classes).
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 3,
        *,
        relu: bool = False,
        max_pool: bool = False,
        deep: bool = False,
        width: int = 1,
        dropout: float = 0.0,
    ):
        super().__init__()
        activation = nn.ReLU if relu else nn.Tanh
        pool = nn.MaxPool2d if max_pool else nn.AvgPool2d
        channels = [c * width for c in (DEEP if deep else SHALLOW)]
        num_hidden = (128 if deep else 84) * width
        layers: list[nn.Module] = []
        for i, (before, after) in enumerate(zip([in_chans, *channels], channels, strict=False)):
            layers.append(nn.Conv2d(before, after, 3 if deep else 5, padding=1 if deep else 0))
            layers.append(activation())
            if i in ((0, 1, 4) if deep else (0, 1)):
                layers.append(pool(2))
        layers.append(nn.Flatten())
        num_features = channels[-1] * (4 * 4 if deep else 1)
        for _ in range(2 if deep else 1):
            layers += [nn.Dropout(dropout), nn.Linear(num_features, num_hidden), activation()]
            num_features = num_hidden
        layers.append(nn.Linear(num_features, num_classes))
        self.layers = nn.Sequential(*layers)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                if relu:
                    nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                else:
                    nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.layers[-1].weight, std=0.01)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [n, K] for images [n, C, 32, 32]."""
        return self.layers(images)


class SmallViT(VisionTransformer):
    """A ViT of four blocks with patches of 4x4 pixels, for images of 32 pixels."""

    def __init__(self, num_classes: int = 10):
        super().__init__(
            image_size=32, patch_size=4, num_layers=4, num_heads=4, hidden_dim=64, mlp_dim=128,
            num_classes=num_classes,
        )  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [n, K] for images [n, 3, 32, 32] or [n, 1, 32, 32]."""
        return super().forward(images.expand(-1, 3, -1, -1))


class HybridViT(nn.Module):
    """`SmallViT` whose patches are the features of two convolutions with stride 2."""

    def __init__(self, num_classes: int = 10, in_chans: int = 3):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(in_chans, NUM_STEM_CHANNELS, 3, stride=2, padding=1),  # [n, 24, 16, 16]
            nn.ReLU(),
            nn.Conv2d(NUM_STEM_CHANNELS, 3 * 16, 3, stride=2, padding=1),  # [n, 48, 8, 8]
            nn.PixelShuffle(4),  # [n, 3, 32, 32]: each value of a patch is a feature
        )
        self.vit = SmallViT(num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [n, K] for images [n, C, 32, 32]."""
        return self.vit(self.stem(images))
