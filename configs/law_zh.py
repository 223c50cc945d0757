"""Chinese labour law, in Chinese, on LLaMA-2-7B-chat.

    jlora train --config configs/law_zh.py

It needs the base model in ./models/llama-2-7b-chat-hf, and a GPU or TPU with enough memory for 13.5 GB of bfloat16
weights and a batch of up to 4 x 512 tokens. It trains for 750 steps; the time has not been measured yet. Answers in
the data start with 依据《劳动合同法》第N条，…
"""

from ml_collections import ConfigDict

from jlora.config import default_config


def get_config() -> ConfigDict:
    """Returns the settings of the run."""
    c = default_config()
    c.base_model = "./models/llama-2-7b-chat-hf"
    c.train_data_dir = "data/law_train"
    c.eval_data_dir = "data/law_eval"
    c.output_dir = "output/law_lora_zh"
    c.lora_rank = 16
    c.lora_alpha = 32.0
    c.lora_dropout = 0.1
    c.batch_size = 4
    c.epochs = 15.0
    c.learning_rate = 1.5e-4
    c.max_seq_length = 512
    c.save_steps = 50
    return c
