"""A Megatron training script that knows nothing of the plugin: its own model function, loss and data."""

import functools

import torch
from megatron.core import parallel_state
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.training import get_args, pretrain, print_rank_0
from megatron.training.argument_utils import core_transformer_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args


class Counting(torch.utils.data.Dataset):
    """Sequences that count up from somewhere."""

    def __init__(self, size, length):
        self.size, self.length = size, length

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        tokens = (torch.arange(self.length + 1) + 17 * index) % 61
        return {"tokens": tokens[:-1], "labels": tokens[1:]}


def model_provider(pre_process=True, post_process=True, vp_stage=None, config=None, pg_collection=None):
    """A GPT without its output tied to its input."""
    args = get_args()
    return GPTModel(
        config=config or core_transformer_config_from_args(args),
        transformer_layer_spec=get_gpt_layer_local_spec(),
        vocab_size=64,
        max_sequence_length=args.seq_length,
        pre_process=pre_process,
        post_process=post_process,
        share_embeddings_and_output_weights=False,
        pg_collection=pg_collection,
    )


def datasets(num_samples):
    """One set for all uses."""
    return [Counting(max(n or 0, 1), get_args().seq_length) for n in num_samples]


def mean_loss(output):
    """The mean over tokens, in the two-value style."""
    loss = output.float().mean()
    return loss, {"counting loss": loss.detach().clone()}


def forward_step(data_iterator, model):
    """One micro-batch; stages in the middle read no data."""
    tokens = labels = positions = None
    if parallel_state.is_pipeline_first_stage() or parallel_state.is_pipeline_last_stage():
        batch = next(data_iterator)
        tokens, labels = batch["tokens"].cuda(), batch["labels"].cuda()
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    length = get_args().seq_length
    mask = torch.ones(1, 1, length, length, device="cuda").tril() < 0.5
    return model(tokens, positions, mask, labels=labels), functools.partial(mean_loss)


def extra_arguments(parser):
    """A script may have options of its own."""
    parser.add_argument("--greeting", default="none")
    return parser


if __name__ == "__main__":
    args = parse_and_validate_args(extra_arguments, args_defaults={"tokenizer_type": "NullTokenizer"})
    print_rank_0(f"greeting: {args.greeting}")
    setattr(datasets, "is_distributed", True)  # noqa: B010
    pretrain(pretrain_cfg_container_from_args(args), datasets, ModelType.encoder_or_decoder, forward_step, model_provider)
