"""torchvision's VGG-16 and ResNets, by its names, in plain PyTorch; and what they make of weights from a seed.

    python tests/torch_networks.py

writes to tests/compat what the tests compare with where there is no PyTorch: activations, and files of `torch.save`.
"""

import zlib
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent / "compat"


def weights(shapes):
    """Random values for entries by their names, which keep activations of about one size through all layers."""
    found = {}
    for name, shape in shapes.items():
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        if name.endswith("running_var"):
            value = rng.uniform(0.5, 2.0, shape)
        elif len(shape) > 1:
            value = rng.normal(0, np.sqrt(2 / np.prod(shape[1:])), shape)
        elif name.endswith("weight"):
            value = rng.uniform(0.3, 0.7, shape) if "bn3" in name else rng.uniform(0.5, 1.5, shape)
        else:
            value = rng.normal(0, 0.1, shape)
        found[name] = value.astype(np.float32)
    return found


def image(height, width):
    """In 0 … 255."""
    return np.random.default_rng(height * width).integers(0, 256, (height, width, 3)).astype(np.float32)


def _modules():
    import torch
    from torch import nn

    class VGG(nn.Module):
        """VGG-16 at output stride 32, as torchvision has it, or 8 with pools of 3 and without the last ones."""

        def __init__(self, width=64, hidden=4096, num_classes=1000, norm=False, dense=False):
            super().__init__()
            layers, before = [], 3
            for stage, (count, factor) in enumerate(zip((2, 2, 3, 3, 3), (1, 2, 4, 8, 8), strict=True)):
                dilation = 2 if dense and stage == 4 else 1
                for _ in range(count):
                    layers.append(nn.Conv2d(before, width * factor, 3, padding=dilation, dilation=dilation))
                    layers += [nn.BatchNorm2d(width * factor)] if norm else []
                    layers.append(nn.ReLU())
                    before = width * factor
                layers.append(nn.MaxPool2d(3, 1 if stage >= 3 else 2, 1) if dense else nn.MaxPool2d(2, 2))
            self.features = nn.Sequential(*layers)
            self.avgpool = nn.AdaptiveAvgPool2d(7)
            self.classifier = nn.Sequential(
                nn.Linear(before * 49, hidden),
                nn.ReLU(),
                nn.Dropout(),
                nn.Linear(hidden, hidden),
                nn.ReLU(),
                nn.Dropout(),
                nn.Linear(hidden, num_classes),
            )

        def forward(self, x):
            return self.classifier(self.avgpool(self.features(x)).flatten(1))

        def large_field_of_view(self, x, step):
            """fc7 of DeepLab-LargeFOV: 3 × 3 cells of the 7 × 7, 12 apart, and every so many-th channel."""
            first, second = self.classifier[0], self.classifier[3]
            kernel = first.weight.reshape(len(first.weight), -1, 7, 7)[::step, :, ::3, ::3]
            x = self.features(x)
            x = nn.functional.conv2d(x, kernel, first.bias[::step], padding=12, dilation=12).relu()
            kernel = second.weight[::step, ::step, None, None]
            return nn.functional.conv2d(x, kernel, second.bias[::step]).relu()

    class Bottleneck(nn.Module):
        def __init__(self, before, channels, stride, dilation, downsample):
            super().__init__()
            self.conv1 = nn.Conv2d(before, channels, 1, bias=False)
            self.bn1 = nn.BatchNorm2d(channels)
            self.conv2 = nn.Conv2d(channels, channels, 3, stride, dilation, dilation, bias=False)
            self.bn2 = nn.BatchNorm2d(channels)
            self.conv3 = nn.Conv2d(channels, 4 * channels, 1, bias=False)
            self.bn3 = nn.BatchNorm2d(4 * channels)
            self.downsample = downsample

        def forward(self, x):
            y = self.bn1(self.conv1(x)).relu()
            y = self.bn2(self.conv2(y)).relu()
            y = self.bn3(self.conv3(y))
            return (y + (x if self.downsample is None else self.downsample(x))).relu()

    class ResNet(nn.Module):
        def __init__(
            self,
            blocks,
            width=64,
            num_classes=1000,
            replace_stride_with_dilation=(False, False, False),
        ):
            super().__init__()
            self.inplanes, self.dilation = width, 1
            self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
            self.bn1 = nn.BatchNorm2d(width)
            self.maxpool = nn.MaxPool2d(3, 2, 1)
            self.layer1 = self._make_layer(width, blocks[0])
            self.layer2 = self._make_layer(2 * width, blocks[1], 2, replace_stride_with_dilation[0])
            self.layer3 = self._make_layer(4 * width, blocks[2], 2, replace_stride_with_dilation[1])
            self.layer4 = self._make_layer(8 * width, blocks[3], 2, replace_stride_with_dilation[2])
            self.fc = nn.Linear(32 * width, num_classes)

        def _make_layer(self, planes, blocks, stride=1, dilate=False):
            previous_dilation, downsample = self.dilation, None
            if dilate:
                self.dilation *= stride
                stride = 1
            if stride != 1 or self.inplanes != 4 * planes:
                downsample = nn.Sequential(
                    nn.Conv2d(self.inplanes, 4 * planes, 1, stride, bias=False), nn.BatchNorm2d(4 * planes)
                )
            layers = [Bottleneck(self.inplanes, planes, stride, previous_dilation, downsample)]
            self.inplanes = 4 * planes
            layers += [Bottleneck(self.inplanes, planes, 1, self.dilation, None) for _ in range(1, blocks)]
            return nn.Sequential(*layers)

        def stages(self, x):
            x = self.maxpool(self.bn1(self.conv1(x)).relu())
            found = [x]
            for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
                x = layer(x)
                found.append(x)
            return found

    return torch, VGG, ResNet


def filled(network):
    """The network with `weights`, in evaluation mode."""
    import torch

    shapes = {
        name: tuple(value.shape) for name, value in network.state_dict().items() if "num_batches" not in name
    }
    network.load_state_dict({name: torch.tensor(v) for name, v in weights(shapes).items()}, strict=False)
    return network.eval()


def run(function, image):
    """What a network makes of an image in 0 … 255, normalised as torchvision does, with the channels last."""
    import torch

    x = torch.tensor(image).permute(2, 0, 1)[None] / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.inference_mode():
        found = function((x - mean[:, None, None]) / std[:, None, None])
    return [y[0].permute(1, 2, 0).numpy() for y in (found if isinstance(found, list) else [found])]


def main():
    torch, vgg, resnet = _modules()
    large = filled(vgg(width=4, hidden=16, num_classes=2, dense=True))
    normed = filled(vgg(width=4, hidden=2, num_classes=2, norm=True))
    dilated = filled(resnet((1, 1, 2, 2), 4, 2, (False, True, True)))
    strided = filled(resnet((1, 1, 2, 2), 4, 2))
    np.savez_compressed(
        FOLDER / "torch_networks.npz",
        large_field_of_view=run(lambda x: large.large_field_of_view(x, 2), image(109, 117))[0][::2, ::2],
        vgg_bn=run(normed.features, image(64, 96))[0],
        resnet_8=run(dilated.stages, image(45, 61))[4][..., ::8],
        resnet_32=run(strided.stages, image(45, 61))[4],
    )
    numbers = torch.arange(24.0).reshape(2, 3, 4)
    state = {
        "float": numbers,
        "part": numbers[1:, :, ::2],
        "turned": numbers.permute(2, 0, 1),
        "half": numbers[0].half(),
        "bfloat16": numbers[0].bfloat16(),
        "long": numbers[0].long(),
        "bool": numbers[0] > 3,
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(numbers[1, 1]),
    }
    for name, new in (("torch_zip.pth", True), ("torch_legacy.pth", False)):
        torch.save(state, FOLDER / name, _use_new_zipfile_serialization=new)


if __name__ == "__main__":
    main()
