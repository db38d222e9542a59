"""From logits to text: sampling filters, the loop, the engines and their kernels."""

from glassgpt.inference.generate import Piece as Piece
from glassgpt.inference.generate import complete as complete
from glassgpt.inference.generate import stream as stream
