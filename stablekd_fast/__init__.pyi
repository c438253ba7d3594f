from stablekd_fast.blocks import pair_blocks as pair_blocks
from stablekd_fast.config import DistillConfig as DistillConfig
from stablekd_fast.data import open_dataset as open_dataset
from stablekd_fast.integrations.blockwise import Blockwise as Blockwise
from stablekd_fast.models.black_box import black_box as black_box
from stablekd_fast.run.distiller import Distiller as Distiller
from stablekd_fast.run.distiller import distill as distill
from stablekd_fast.run.exported import evaluate_file as evaluate_file

__version__: str
