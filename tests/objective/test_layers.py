"""Where networks' layers are found to be, in networks of every kind."""

from __future__ import annotations

import gc
import pickle
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from lightning_dynamics.objective.double_backward import twice_differentiable
from lightning_dynamics.objective.layers import Anatomy, Tap, discover, resolve

N = 5


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def look(net, *inputs, run=None, **options):
    with torch.no_grad():
        return discover(net, run or (lambda: net(*inputs)), **options)


def names(anatomy):
    return [tap.name for tap in anatomy.hidden]


def vectors(d=4):
    return torch.randn(N, d)


def images(size=8, channels=3):
    return torch.randn(N, channels, size, size)


# Networks.


class FunctionalMLP(nn.Module):
    def __init__(self, activation=F.relu):
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(4, 6), nn.Linear(6, 7), nn.Linear(7, 3)
        self.activation = activation

    def forward(self, x):
        return self.fc3(self.activation(self.fc2(self.activation(self.fc1(x)))))


class SharedReluMLP(FunctionalMLP):
    def __init__(self):
        super().__init__(nn.ReLU())


class BasicBlock(nn.Module):
    def __init__(self, before, after, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.downsample = None
        if stride > 1 or before != after:
            self.downsample = nn.Sequential(nn.Conv2d(before, after, 1, stride), nn.BatchNorm2d(after))

    def forward(self, x):
        way = x if self.downsample is None else self.downsample(x)
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += way
        return self.relu(out)


class PreActivationBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, 1, 1)
        self.bn2, self.conv2 = nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, 1, 1)

    def forward(self, x):
        return x + self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))


class ResNet(nn.Module):
    def __init__(self, classes=3, head_first=False):
        super().__init__()
        if head_first:
            self.fc = nn.Linear(8, classes)
        self.conv1 = nn.Conv2d(3, 4, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(2)
        self.layer1 = nn.Sequential(BasicBlock(4, 4), BasicBlock(4, 4))
        self.layer2 = nn.Sequential(BasicBlock(4, 8, 2), BasicBlock(8, 8))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        if not head_first:
            self.fc = nn.Linear(8, classes)

    def features(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return torch.flatten(self.avgpool(self.layer2(self.layer1(x))), 1)

    def forward(self, x):
        return self.fc(self.features(x))


RESNET = ["maxpool", "layer1.0", "layer1.1", "layer2.0", "layer2.1"]


class PreActivationResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, 1, 1)
        self.blocks = nn.ModuleList([PreActivationBlock(4) for _ in range(3)])
        self.norm = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        x = self.conv(x)
        for block in self.blocks:
            x = block(x)
        return self.fc(F.relu(self.norm(x)).mean((2, 3)))


class Attention(nn.Module):
    """A block of a vision transformer."""

    def __init__(self, d=8):
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(d), nn.MultiheadAttention(d, 2, batch_first=True)
        self.norm2 = nn.LayerNorm(d)
        self.mlp = nn.Sequential(nn.Linear(d, 2 * d), nn.GELU(), nn.Dropout(0.1), nn.Linear(2 * d, d))

    def forward(self, x):
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class Encoder(nn.Module):
    def __init__(self, depth):
        super().__init__()
        self.position = nn.Parameter(torch.randn(1, 17, 8))
        self.dropout = nn.Dropout(0.1)
        self.layers = nn.ModuleList([Attention() for _ in range(depth)])
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        x = self.dropout(x + self.position)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class ViT(nn.Module):
    def __init__(self, encoder, head=None):
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 2, 2)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.encoder = encoder
        self.head = nn.Linear(8, 3) if head is None else head

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = self.encoder(torch.cat([self.token.expand(len(x), -1, -1), x], 1))
        return self.head(x[:, 0])


class DenseBlock(nn.Module):
    def __init__(self, width, growth=4):
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(width + i * growth, growth, 3, 1, 1) for i in range(3)])

    def forward(self, x):
        for conv in self.convs:
            x = torch.cat([x, F.relu(conv(x))], 1)
        return x


class DenseNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, 1, 1)
        self.block1, self.transition1 = DenseBlock(4), nn.Sequential(nn.BatchNorm2d(16), nn.Conv2d(16, 8, 1))
        self.block2, self.transition2 = DenseBlock(8), nn.Sequential(nn.BatchNorm2d(20), nn.Conv2d(20, 8, 1))
        self.fc = nn.Linear(8, 3)

    def forward(self, x):
        x = self.transition1(self.block1(self.stem(x)))
        x = self.transition2(self.block2(F.avg_pool2d(x, 2)))
        return self.fc(x.mean((2, 3)))


class WithAuxiliary(nn.Module):
    """The auxiliary head runs before the rest of the network."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(4, 6), nn.Linear(6, 7), nn.Linear(7, 3)
        self.auxiliary = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))

    def forward(self, x):
        x = F.relu(self.fc1(x))
        aux = self.auxiliary(x) if self.training else None
        logits = self.fc3(F.relu(self.fc2(x)))
        return (logits, aux) if self.training else logits


class Wrapper(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, *args):
        return self.net(*args)


class FromFunction(nn.Module):
    """Named parts, and how they are put together."""

    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *args):
        return self.function(self, *args)


def mlp():
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3))


# Hidden blocks.


def test_sequential_blocks_are_measured_behind_their_activations():
    anatomy = look(mlp(), vectors())
    assert (anatomy.head, names(anatomy), anatomy.features) == ("4", ["1"], Tap("4", "input"))


def test_functional_activations_are_reached_by_the_next_layers_input():
    assert names(look(FunctionalMLP(), vectors())) == ["fc2:input"]
    assert names(look(FunctionalMLP(lambda x: F.relu(x, inplace=True)), vectors())) == ["fc2:input"]


def test_an_activation_written_in_place_is_noticed_in_inference_mode():
    with torch.inference_mode():
        assert names(discover(net := FunctionalMLP(F.relu_), lambda: net(vectors()))) == ["fc2:input"]


def test_a_module_that_runs_twice_is_passed_over():
    anatomy = look(SharedReluMLP(), vectors())
    assert (names(anatomy), anatomy.calls["activation"]) == (["fc2:input"], 2)


def test_blocks_of_a_sequential_cnn_reach_to_the_last_thing_before_the_next():
    net = nn.Sequential(
        *(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
        *(nn.Conv2d(4, 4, 2), nn.BatchNorm2d(4), nn.ReLU(inplace=True)),
        *(nn.Flatten(), nn.Linear(16, 6), nn.ReLU(), nn.Dropout(), nn.Linear(6, 3)),
    )
    assert names(look(net.eval(), images())) == ["3", "6"]  # a flattening makes no difference


def test_a_flattening_before_the_head_makes_no_other_layer():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    assert names(look(net, images())) == []


def test_a_residual_network_has_its_blocks():
    for training in (False, True):
        anatomy = look(ResNet().train(training), images())
        assert (anatomy.head, names(anatomy), dict(anatomy.left_out)) == ("fc", RESNET, {})


def test_execution_counts_and_not_registration():
    anatomy = look(ResNet(head_first=True), images())
    assert (anatomy.head, names(anatomy)) == ("fc", RESNET)


def test_a_residual_network_before_its_activations_has_its_sums():
    anatomy = look(PreActivationResNet(), images())
    assert names(anatomy) == ["conv", "blocks.0", "blocks.1", "blocks.2"]


def test_residual_branches_without_a_module_of_their_own_are_blocks_measured_behind_the_sum():
    def forward(net, x):
        x = net.stem(x)
        for branch in net.branches:
            x = x + branch(x)
        return net.head(net.norm(x))

    branches = nn.ModuleList([nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 6))] * 1)
    branches.extend(nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 6)) for _ in range(2))
    net = FromFunction(
        forward, head=nn.Linear(6, 3), branches=branches, stem=nn.Linear(4, 6), norm=nn.BatchNorm1d(6, affine=False)
    )
    assert names(look(net, vectors())) == ["stem", "branches.1:input", "branches.2:input", "branches.2"]


def test_a_vision_transformer_has_its_encoders_layers():
    anatomy = look(ViT(Encoder(3)).eval(), images())
    assert anatomy.head == "head"
    assert names(anatomy) == ["encoder.dropout", *(f"encoder.layers.{i}" for i in range(3))]


def test_a_pytorch_encoder_has_its_layers():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    for training in (False, True):
        encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        anatomy = look(ViT(encoder).train(training), images())
        assert names(anatomy) == ["encoder.layers.0:input", *(f"encoder.layers.{i}" for i in range(3))]


def test_blocks_that_put_samples_second_are_left_out():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 2, enable_nested_tensor=False)
    net = FromFunction(
        lambda net, x: net.head(net.encoder(x.transpose(0, 1))[0]), encoder=encoder, head=nn.Linear(8, 3)
    )
    anatomy = look(net, torch.randn(N, 7, 8))
    assert (anatomy.head, names(anatomy)) == ("head", [])
    assert "(7, 5, 8)" in anatomy.left_out["encoder.layers.0"]


def test_concatenation_inside_a_block_stays_inside():
    anatomy = look(DenseNet(), images())
    assert names(anatomy) == ["stem", "block1", "block2:input", "block2"]


def test_concatenation_of_layers_is_what_the_next_one_is_given():
    def forward(net, x):
        a = F.relu(net.fc1(x))
        b = F.relu(net.fc2(torch.cat([x, a], 1)))
        return net.head(torch.cat([x, a, b], 1))

    net = FromFunction(forward, fc1=nn.Linear(4, 6), fc2=nn.Linear(10, 5), head=nn.Linear(15, 3))
    assert names(look(net, vectors())) == ["fc2:input"]


class Pair(nn.Module):
    def __init__(self, before, after):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(before, after), nn.Linear(after, after)

    def forward(self, x):
        return F.relu(self.fc2(F.relu(self.fc1(x))))


class Backbone(nn.Module):
    def __init__(self, wrap=lambda block: block):
        super().__init__()
        self.a, self.b, self.c = wrap(Pair(4, 6)), wrap(Pair(6, 7)), wrap(Pair(7, 8))

    def forward(self, x):
        return self.c(self.b(self.a(x)))


def test_a_backbone_is_opened_and_a_repeated_composition_is_not():
    net = FromFunction(lambda net, x: net.head(net.backbone(x)), head=nn.Linear(8, 3), backbone=Backbone())
    assert names(look(net, vectors())) == ["backbone.a", "backbone.b"]


def test_what_wraps_is_told_by_what_it_wraps():
    net = FromFunction(lambda net, x: net.head(net.backbone(x)), head=nn.Linear(8, 3))
    net.backbone = Wrapper(Backbone(Wrapper))
    assert names(look(net, vectors())) == ["backbone.net.a", "backbone.net.b"]


def test_a_teacher_of_the_same_type_does_not_close_a_backbone():
    def forward(net, x):
        net.teacher(x)
        return net.head(net.backbone(x))

    net = FromFunction(forward, head=nn.Linear(8, 3), backbone=Backbone(), teacher=Backbone())
    assert names(look(net, vectors())) == ["backbone.a", "backbone.b"]


def test_the_two_halves_of_a_transformers_layer_stay_together():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down, self.norm = nn.Linear(8, 9), nn.Linear(9, 8), nn.LayerNorm(8)

        def forward(self, x):
            return self.norm(x + self.down(F.relu(self.up(x))))

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix, self.mlp = Half(), Half()

        def forward(self, x):
            return self.mlp(self.mix(x))

    net = FromFunction(lambda net, x: net.head(net.layers(x)), layers=nn.Sequential(Layer(), Layer(), Layer()))
    net.head = nn.Linear(8, 3)
    assert names(look(net, vectors(8))) == ["layers.0", "layers.1"]


def test_activations_behind_a_block_belong_to_it_and_norms_and_pooling_do_not():
    class Sum(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, width, 3), nn.Conv2d(3, width, 3)

        def forward(self, x):
            return self.a(x) + self.b(x)

    net = nn.Sequential(Sum(3), nn.ReLU(), Sum(3), nn.BatchNorm2d(3), nn.ReLU(), Sum(5), nn.Flatten(), nn.Linear(20, 3))
    assert names(look(net.eval(), images())) == ["1", "2"]


def test_layers_that_are_added_are_one():
    net = FromFunction(lambda net, x: net.head(F.relu(net.c(F.relu(net.a(x) + net.b(x))))))
    net.head, net.c, net.a, net.b = nn.Linear(6, 3), nn.Linear(6, 6), nn.Linear(4, 6), nn.Linear(4, 6)
    assert names(look(net, vectors())) == ["c:input"]


def test_norms_of_images_begin_no_block():
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.LayerNorm((4, 6, 6)), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5), nn.ReLU()
    )
    net.append(nn.Linear(5, 3))
    assert names(look(net, images())) == ["2"]


def test_parts_of_a_block_that_have_another_name_too_stay_inside():
    encoder = Encoder(2)
    net = FromFunction(lambda root, x: root.net(x), watched=encoder.layers[0].mlp, net=ViT(encoder))
    expected = ["net.encoder.dropout", "net.encoder.layers.0", "net.encoder.layers.1"]
    assert names(look(net.eval(), images())) == expected


def test_stages_of_blocks_are_opened():
    class Stage(nn.Module):
        def __init__(self, before, after):
            super().__init__()
            self.down = nn.Conv2d(before, after, 1)
            self.blocks = nn.Sequential(BasicBlock(after, after), BasicBlock(after, after))

        def forward(self, x):
            return self.blocks(self.down(x))

    net = nn.Sequential(Stage(3, 4), Stage(4, 6), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))
    expected = ["0.down", "0.blocks.0", "0.blocks.1", "1.down", "1.blocks.0", "1.blocks.1"]
    assert names(look(net, images())) == expected


def test_embeddings_that_are_added_are_one_block():
    class Embeddings(nn.Module):
        def __init__(self):
            super().__init__()
            self.word, self.position, self.norm = nn.Embedding(9, 8), nn.Embedding(7, 8), nn.LayerNorm(8)

        def forward(self, ids):
            return self.norm(self.word(ids) + self.position(torch.arange(ids.shape[1])))

    net = FromFunction(
        lambda net, ids: net.head(net.layer(net.embeddings(ids)).mean(1)),
        embeddings=Embeddings(),
        layer=Attention(),
        head=nn.Linear(8, 3),
    )
    assert names(look(net, torch.randint(0, 9, (N, 7)))) == ["embeddings", "layer"]


def test_both_passes_of_a_siamese_network_are_named_as_the_reason():
    def forward(net, x, y):
        return net.head((net.backbone(x) - net.backbone(y)).abs())

    net = FromFunction(forward, backbone=FunctionalMLP(), head=nn.Linear(3, 2))
    anatomy = look(net, vectors(), vectors())
    assert (anatomy.head, names(anatomy)) == ("head", [])
    assert "2 times" in anatomy.left_out["backbone.fc1"]


def test_a_layer_whose_weights_are_shared_is_left_out():
    def forward(net, x):
        x = F.relu(net.first(x))
        for _ in range(3):
            x = F.relu(net.shared(x))
        return net.head(x)

    net = FromFunction(forward, first=nn.Linear(4, 6), shared=nn.Linear(6, 6), head=nn.Linear(6, 3))
    anatomy = look(net, vectors())
    assert (names(anatomy), list(anatomy.left_out)) == ([], ["first", "shared"])
    assert "`shared` runs 3 times" in anatomy.left_out["first"]


def test_recurrent_layers_are_reached_by_the_next_ones_input():
    def forward(net, x):
        return net.head(net.two(net.one(x)[0])[0][:, -1])

    one, two = (nn.LSTM(d, 6, batch_first=True) for d in (4, 6))
    net = FromFunction(forward, one=one, two=two, head=nn.Linear(6, 3))
    assert names(look(net, torch.randn(N, 7, 4))) == ["two:input"]


def test_blocks_that_return_several_tensors_are_left_out_and_those_that_wrap_one_are_not():
    class Layer(Attention):
        def __init__(self, extra):
            super().__init__()
            self.extra = extra

        def forward(self, x):
            out = super().forward(x)
            return (out, out.mean()) if self.extra else (out,)

    def forward(net, x):
        for layer in net.layers:
            x = layer(x)[0]
        return net.head(x.mean(1))

    net = FromFunction(forward, layers=nn.ModuleList([Layer(False), Layer(True)]), head=nn.Linear(8, 3))
    anatomy = look(net, torch.randn(N, 7, 8))
    assert names(anatomy) == ["layers.0"]
    assert "tuple with 2 tensors" in anatomy.left_out["layers.1"]


def test_two_towers_are_both_there():
    def forward(net, x, y):
        return net.head(torch.cat([net.images(x), net.table(y)], 1))

    towers = {"images": nn.Sequential(nn.Flatten(), nn.Linear(192, 6), nn.ReLU()), "table": mlp()}
    net = FromFunction(forward, head=nn.Linear(9, 3), **towers)
    assert names(look(net, images(), vectors())) == ["images.2", "table.1", "table.3"]


@pytest.mark.parametrize(
    ("make", "inputs"),
    [
        (mlp, vectors),
        (FunctionalMLP, vectors),
        (SharedReluMLP, vectors),
        (ResNet, images),
        (PreActivationResNet, images),
        (lambda: ViT(Encoder(2)), images),
        (DenseNet, images),
    ],
)
def test_what_is_found_can_be_tapped_and_comes_in_order(make, inputs):
    net, caught = make().eval(), []
    anatomy = look(net, inputs())
    for tap in anatomy.hidden:
        assert anatomy.calls[tap.module] == 1
        submodule = net.get_submodule(tap.module)

        def catch(_, args, kwargs, output=None, tap=tap):
            caught.append((tap, tap.pick(args, kwargs, output)))

        register = submodule.register_forward_pre_hook if tap.side == "input" else submodule.register_forward_hook
        register(catch, with_kwargs=True)
    with torch.no_grad():
        net(inputs())
    assert [tap for tap, _ in caught] == list(anatomy.hidden)
    assert all(len(value) == N and value.is_floating_point() for _, value in caught)


# What does not lead to the head.


def test_an_auxiliary_head_is_no_layer():
    net = WithAuxiliary()
    for training in (False, True):
        anatomy = look(net.train(training), vectors())
        assert (anatomy.head, names(anatomy)) == ("fc3", ["fc2:input"])


def test_a_teacher_that_runs_first_is_no_layer():
    def forward(net, x):
        with torch.no_grad():
            target = net.teacher(x).softmax(1)
        return -(target * net.student(x).log_softmax(1)).sum(1).mean()

    net = FromFunction(forward, teacher=mlp().requires_grad_(False), student=mlp())
    anatomy = look(net, vectors())
    assert (anatomy.head, names(anatomy)) == ("student.4", ["student.1"])


def test_a_frozen_teacher_that_runs_last_is_no_head():
    net = FromFunction(
        lambda net, x: F.mse_loss(net.student(x), net.teacher(x)), student=mlp(), teacher=mlp().requires_grad_(False)
    )
    assert look(net, vectors()).head == "student.4"


def test_the_root_may_hold_losses_metrics_and_parts_that_never_run():
    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("weight", torch.ones(3))

        def forward(self, logits, y):
            return F.cross_entropy(logits, y, self.weight)

    class Module(nn.Module):
        def __init__(self):
            super().__init__()
            self.teacher, self.criterion, self.metrics = mlp(), Loss(), nn.ModuleDict({"m": Loss()})
            self.net = Wrapper(Wrapper(ResNet()))

        def training_step(self, x, y):
            logits = self.net(x)
            self.metrics["m"](logits, y)
            return {"loss": self.criterion(logits, y)}

    module, y = Module(), torch.zeros(N, dtype=torch.long)
    anatomy = look(module, run=lambda: module.training_step(images(), y))
    assert anatomy.head == "net.net.net.fc"
    assert names(anatomy) == [f"net.net.net.{name}" for name in RESNET]
    assert "teacher.0" in anatomy.idle


def test_what_a_module_remembers_connects_nothing():
    class Centre(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(6))

        def forward(self, x):
            self.mean.mul_(0.9).add_(0.1 * x.mean(0))
            return x - self.mean

    def forward(net, x):
        net.centre(net.other2(net.tanh(net.other1(x))))
        return net.head(F.relu(net.fc2(F.relu(net.centre(net.fc1(x))))))

    net = FromFunction(forward, other1=nn.Linear(4, 6), other2=nn.Linear(6, 6), tanh=nn.Tanh(), centre=Centre())
    net.fc1, net.fc2, net.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)
    anatomy = look(net, vectors())
    assert (names(anatomy), dict(anatomy.left_out)) == (["fc2:input"], {})


# Heads.


@pytest.mark.parametrize(
    "finish",
    [
        lambda z: z,
        lambda z: z.log_softmax(1),
        lambda z: {"loss": z.sum(), "logits": z},
        lambda z: (z.sum(), [z]),
        lambda z: F.cross_entropy(z, torch.zeros(N, dtype=torch.long)),
        lambda z: float(z.sum()),
        lambda z: None,
        lambda z: z.div_(2),
    ],
    ids=["logits", "log_softmax", "dict", "tuple", "loss", "number", "nothing", "in place"],
)
def test_the_head_is_found_whatever_is_returned(finish):
    net = FunctionalMLP()
    anatomy = look(net, run=lambda: finish(net(vectors())))
    assert (anatomy.head, names(anatomy), anatomy.problem) == ("fc3", ["fc2:input"], "")


def test_a_squeezed_single_logit_is_a_heads_output():
    net = FromFunction(lambda net, x: net.last(net.head(x).squeeze(1)), head=nn.Linear(4, 1), last=nn.Identity())
    assert look(net, vectors()).head == "head"


def test_the_number_of_outputs_picks_the_head():
    def forward(net, x):
        h = F.relu(net.fc(x))
        return net.project(h), net.classify(h), net.binary(h)

    parts = {"fc": nn.Linear(4, 6), "project": nn.Linear(6, 9), "classify": nn.Linear(6, 3), "binary": nn.Linear(6, 1)}
    net = FromFunction(forward, **parts)
    assert look(net, vectors()).head == "project"
    assert look(net, vectors(), num_outputs=3).head == "classify"
    assert look(net, vectors(), num_outputs=2).head == "binary"
    anatomy = look(net, vectors(), num_outputs=4)
    assert anatomy.head is None
    assert "4 outputs" in anatomy.problem


def test_a_projection_that_runs_after_the_head_is_not_the_head_that_is_returned():
    def forward(net, x):
        h = F.relu(net.fc(x))
        logits = net.classify(h)
        return logits, F.normalize(net.project(h))

    net = FromFunction(forward, fc=nn.Linear(4, 6), project=nn.Linear(6, 9), classify=nn.Linear(6, 3))
    assert look(net, vectors()).head == "classify"


def test_features_that_are_returned_too_are_not_the_heads_output():
    def forward(net, x):
        z = net.embed(x)
        return z, net.head(z)

    net = FromFunction(forward, embed=nn.Linear(4, 6), head=nn.Linear(6, 3))
    assert look(net, vectors()).head == "head"


def test_a_linear_layer_inside_of_the_loss_is_told_by_the_number_of_outputs():
    net = FromFunction(lambda net, x: net.inside(net.net(x)).sum(), net=mlp(), inside=nn.Linear(3, 8))
    anatomy = look(net, vectors(), num_outputs=3)
    assert (anatomy.head, names(anatomy)) == ("net.4", ["net.1"])


def test_a_classifier_of_samples_goes_before_one_of_tokens():
    def forward(net, x):
        return net.tokens(x), net.head(x.mean(1))

    net = FromFunction(forward, tokens=nn.Linear(4, 9), head=nn.Linear(4, 3))
    assert look(net, torch.randn(N, 7, 4)).head == "head"


def test_a_head_may_be_wrapped():
    head = FromFunction(lambda net, x: net.flatten(net.fc(net.dropout(x))), fc=nn.Linear(8, 3), dropout=nn.Dropout(0.0))
    head.flatten = nn.Identity()
    assert look(ViT(Encoder(2), head), images()).head == "head.fc"


@pytest.mark.parametrize("linear", [nn.LazyLinear, type("Own", (nn.Linear,), {})], ids=["lazy", "subclass"])
def test_a_head_may_be_of_a_subclass(linear):
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), linear(3) if linear is nn.LazyLinear else linear(6, 3))
    assert look(net, vectors()).head == "2"


def test_a_convolutional_head_is_none():
    class Gate(nn.Module):
        """Two linear layers that are given vectors."""

        def __init__(self):
            super().__init__()
            self.squeeze, self.excite = nn.Linear(4, 2), nn.Linear(2, 4)

        def forward(self, x):
            return x * self.excite(F.relu(self.squeeze(x.mean((2, 3))))).sigmoid()[:, :, None, None]

    parts = [nn.Conv2d(3, 4, 3), nn.ReLU(), Gate(), nn.Conv2d(4, 3, 1)]
    for end in (nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), FromFunction(lambda _, x: x.mean((2, 3)))):
        anatomy = look(nn.Sequential(*parts, end), images())
        assert anatomy.head is None
        assert anatomy.features is None
        assert "2.excite" in anatomy.problem
        assert names(anatomy) == ["1", "2"]


def test_a_network_without_linear_layers_has_no_head():
    anatomy = look(nn.Sequential(nn.Conv2d(3, 4, 8), nn.ReLU(), nn.Conv2d(4, 3, 1), nn.Flatten()), images())
    assert (anatomy.head, names(anatomy)) == (None, ["1"])
    assert "nn.Linear" in anatomy.problem


def test_a_convolution_whose_output_is_pooled_by_a_function_is_not_hidden():
    net = FromFunction(lambda net, x: net.classify(F.relu(net.conv(x))).mean((2, 3)), conv=nn.Conv2d(3, 4, 3))
    net.classify = nn.Conv2d(4, 3, 1)
    assert names(look(net, images())) == ["classify:input"]


def test_a_functional_head_is_none():
    net = FromFunction(lambda net, x: F.linear(F.relu(net.fc(x)), net.weight), fc=nn.Linear(4, 6))
    net.weight = nn.Parameter(torch.randn(3, 6))
    anatomy = look(net, vectors())
    assert anatomy.head is None
    assert "`fc`" in anatomy.problem


def test_a_language_models_head_classifies_no_samples():
    net = FromFunction(
        lambda net, ids: net.head(net.layers(net.embed(ids))),
        embed=nn.Embedding(9, 8),
        layers=nn.Sequential(Attention(), Attention()),
        head=nn.Linear(8, 9),
    )
    for run in (None, lambda: net(torch.randint(0, 9, (N, 7))).log_softmax(-1).sum()):
        anatomy = look(net, torch.randint(0, 9, (N, 7)), run=run)
        assert anatomy.head is None
        assert "`head`" in anatomy.problem
        assert "(5, 7, 8)" in anatomy.problem
        assert names(anatomy) == ["embed", "layers.0"]


def test_a_network_may_be_its_own_head():
    anatomy = look(nn.Linear(4, 3), vectors())
    assert (anatomy.head, anatomy.features, anatomy.hidden) == ("", Tap("", "input"), ())
    assert resolve(anatomy, ":input") == (anatomy.features,)


def test_a_run_that_uses_nothing_of_the_module_finds_nothing():
    anatomy = look(mlp(), run=lambda: None)
    assert (anatomy.head, anatomy.hidden, len(anatomy.idle)) == (None, (), 5)


# Machinery.


def test_compiled_modules_are_seen_through():
    net = nn.Sequential(torch.compile(BasicBlock(3, 4)), torch.compile(BasicBlock(4, 4)), nn.Flatten())
    net = nn.Sequential(net, torch.compile(nn.Sequential(nn.Linear(256, 6), nn.ReLU(), nn.Linear(6, 3))))
    if not hasattr(torch.compiler, "set_stance"):
        for compiled in (net[0][0], net[0][1], net[1]):
            compiled.forward = compiled._orig_mod.__call__
    with twice_differentiable(net):
        anatomy = discover(net, lambda: net(images()))
    assert anatomy.head == "1._orig_mod.2"
    assert names(anatomy) == ["0.0", "0.1"]


@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_parametrized_layers_are_layers(wrap):
    net = nn.Sequential(wrap(nn.Conv2d(3, 4, 8)), nn.ReLU(), nn.Flatten(), wrap(nn.Linear(4, 7)), nn.ReLU())
    net.append(wrap(nn.Linear(7, 3)))
    anatomy = look(net, images())
    assert (anatomy.head, names(anatomy), dict(anatomy.left_out)) == ("5", ["1"], {})
    assert not any("parametrizations" in tap.name for tap in anatomy.order)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_blocks_are_blocks(use_reentrant):
    class Checkpointed(BasicBlock):
        def forward(self, x):
            return checkpoint(super().forward, x, use_reentrant=use_reentrant)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.blocks = nn.Conv2d(3, 4, 1), nn.ModuleList([BasicBlock(4, 4), Checkpointed(4, 4)])
            self.fc = nn.Linear(4, 3)

        def forward(self, x):
            x = self.blocks[1](checkpoint(self.blocks[0], self.stem(x), use_reentrant=use_reentrant))
            return self.fc(x.mean((2, 3)))

    net = Net()
    with torch.enable_grad():
        anatomy = discover(net, lambda: net(images()))
    assert (anatomy.head, names(anatomy)) == ("fc", ["stem", "blocks.0", "blocks.1"])


def test_scripted_code_is_one_block():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 6)

        def forward(self, x):
            return torch.relu(self.b(torch.relu(self.a(x))))

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of its age
        scripted = torch.jit.trace(Two(), vectors())
    net = nn.Sequential(nn.Linear(4, 4), scripted, nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    assert names(look(net, vectors())) == ["0", "1"]


def test_keyword_inputs_count():
    net = FromFunction(lambda net, x: net.head(input=F.relu(net.two(input=F.relu(net.one(input=x))))))
    net.one, net.two, net.head = nn.Linear(4, 5), nn.Linear(5, 6), nn.Linear(6, 3)
    anatomy = look(net, vectors())
    assert (anatomy.head, names(anatomy)) == ("head", ["two:input"])


def test_an_exception_that_the_network_catches_does_no_harm():
    def forward(net, x):
        try:
            x = net.bad(x)
        except RuntimeError:
            x = net.good(x)
        return net.head(F.relu(x))

    net = FromFunction(forward, bad=nn.Linear(9, 6), good=nn.Linear(4, 6), head=nn.Linear(6, 3))
    anatomy = look(net, vectors())
    assert (anatomy.head, "bad" in anatomy.calls) == ("head", False)


# No trace.


def hooks(net):
    return [
        len(getattr(m, registry))
        for m in net.modules()
        for registry in (
            "_forward_hooks",
            "_forward_pre_hooks",
            "_forward_hooks_with_kwargs",
            "_forward_pre_hooks_with_kwargs",
        )
    ]


def test_nothing_stays_behind():
    net, activations = ResNet(), []
    net.layer1[0].register_forward_hook(lambda *args: activations.append(weakref.ref(args[2].untyped_storage())))
    before, x = hooks(net), images()
    state = torch.get_rng_state()
    with torch.no_grad():
        gc.disable()
        try:
            anatomy = discover(net.eval(), lambda: net(x))
            assert activations[0]() is None
        finally:
            gc.enable()
    assert hooks(net) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert pickle.loads(pickle.dumps(anatomy)) == anatomy


def test_hooks_are_removed_when_the_network_fails():
    net = mlp()
    before = hooks(net)
    with pytest.raises(RuntimeError):
        look(net, vectors(9))
    assert hooks(net) == before


@pytest.mark.parametrize("grad", [False, True])
def test_the_network_runs_once_and_as_it_would(grad):
    net, results, modes = ResNet().eval(), [], []

    def run():
        modes.append(torch.is_grad_enabled())
        results.append(net(torch.ones(N, 3, 8, 8)))

    with torch.set_grad_enabled(grad):
        discover(net, run)
        assert modes == [grad]
        torch.testing.assert_close(results[0], net(torch.ones(N, 3, 8, 8)), rtol=0, atol=0)


# Names.


def test_taps_are_written_and_read():
    for tap in (Tap("net.fc2"), Tap("net.fc2", "input")):
        assert Tap.parse(tap.name) == tap
        assert str(tap) == tap.name
    assert Tap.parse("net.fc2:output") == Tap("net.fc2")
    with pytest.raises(ValueError, match="not 'weight'"):
        Tap.parse("net.fc2:weight")


def test_a_tap_picks_its_tensor():
    x, y = torch.zeros(1), torch.ones(1)
    assert Tap("a", "input").pick((x,), {"mask": y}, y) is x
    assert Tap("a", "input").pick((), {"flag": True, "input": x}) is x
    for output in (y, (y,), [None, y], {"out": y}):
        assert Tap("a").pick((x,), {}, output) is y
    with pytest.raises(ValueError, match="`a` returns tuple with 2 tensors"):
        Tap("a").pick((x,), {}, (x, y))
    with pytest.raises(ValueError, match="`a:input` is given no tensor"):
        Tap("a", "input").pick((), {}, y)


@pytest.fixture
def anatomy():
    return look(ResNet(head_first=True), images())


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ("layer1.0", ["layer1.0"]),
        ("fc:input", ["fc:input"]),
        (["fc:input", "layer2.0", "conv1:output", "layer2.0"], ["conv1", "layer2.0", "fc:input"]),
        (r"layer\d\.\d", ["layer1.0", "layer1.1", "layer2.0", "layer2.1"]),
        (r"layer[12]:input", ["layer1:input", "layer2:input"]),
        ("auto", RESNET),
        (["fc:input", "auto"], [*RESNET, "fc:input"]),
        ([r"layer1\..", "layer1.0:input", "layer1"], ["layer1.0:input", "layer1.0", "layer1.1", "layer1"]),
        ([], []),
    ],
)
def test_names_and_patterns_are_resolved_in_order_of_execution(anatomy, wanted, expected):
    assert [tap.name for tap in resolve(anatomy, wanted)] == expected


def test_a_name_that_exists_is_no_pattern():
    net = nn.ModuleDict({"layer1": nn.ModuleList([nn.Linear(2, 2)]), "layer1x0": nn.Linear(2, 2)})
    assert resolve(net, "layer1.0") == (Tap("layer1.0"),)
    assert resolve(net, "layer1.?0") == (Tap("layer1.0"), Tap("layer1x0"))


def test_unknown_names_are_refused_with_the_closest_first(anatomy):
    with pytest.raises(ValueError, match=r"`layer1\.O` matches no submodule.*there are: layer1"):
        resolve(anatomy, "layer1.O")
    with pytest.raises(ValueError, match=r"regular expression"):
        resolve(anatomy, "layer[")
    with pytest.raises(ValueError, match="got int 3"):
        resolve(anatomy, [3])
    with pytest.raises(ValueError, match="`'auto'` needs the order"):
        resolve(ResNet(), "auto")


def test_what_does_not_run_is_refused():
    net = WithAuxiliary().eval()
    with pytest.raises(ValueError, match="does not run"):
        resolve(look(net, vectors()), "auxiliary.0")
    assert resolve(net, "auxiliary.0") == (Tap("auxiliary.0"),)


def test_an_anatomy_can_be_written_by_hand():
    anatomy = Anatomy("fc", (Tap("a"),))
    assert anatomy.features == Tap("fc", "input")
