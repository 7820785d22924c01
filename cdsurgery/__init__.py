"""Run a language model's most confident near-final layer: wrap, generate, export, serve.

    import cdsurgery

    model = cdsurgery.wrap("examples/tiny_lm", lookback=10)
    out = model(input_ids=ids)            # out.logits, out.final_logits, out.selected_layer, out.entropy

`cdsurgery.export` (ONNX and what follows from it) is imported on its own and needs the `onnx` extra.
"""

from cdsurgery.anatomy import Anatomy as Anatomy
from cdsurgery.config import ConfidentConfig as ConfidentConfig
from cdsurgery.errors import ArtifactError as ArtifactError
from cdsurgery.errors import InvalidInputError as InvalidInputError
from cdsurgery.errors import SurgeryError as SurgeryError
from cdsurgery.errors import UnsupportedModelError as UnsupportedModelError
from cdsurgery.head import ConfidentHead as ConfidentHead
from cdsurgery.output import ConfidentOutput as ConfidentOutput
from cdsurgery.transforms import Transform as Transform
from cdsurgery.version import __version__ as __version__
from cdsurgery.wrap import unwrap as unwrap
from cdsurgery.wrap import wrap as wrap
