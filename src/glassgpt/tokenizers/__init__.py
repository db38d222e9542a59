"""Text to token ids and back; chat templates."""

from glassgpt.tokenizers.tokenizer import Tokenizer as Tokenizer
from glassgpt.tokenizers.tokenizer import load_tokenizer as load_tokenizer
from glassgpt.tokenizers.vocabulary import build_tokenizer as build_tokenizer
