"""A fixed, lossless tokenizer for the grammar of the stand-in word problems: one token per number, word or sign.

Nothing is trained: the vocabulary is written down here, so that two runs, two machines and two years agree on every id.
Text outside the grammar costs one token per UTF-8 byte and comes back unchanged.
"""

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD, EOS = "<pad>", "<eos>"
NAMES = "Tom Ana Ben Mia Leo Zoe Sam Eva"
# words that open a sentence or a line are needed with and without the space before them
OPENERS = "How Now Half What Find So The Each Question Answer Solution Problem"
WORDS = """
apples books coins pens cards stamps
a as and answer are away be by buys does each finds for from get gets gives half has have he her his how in is it its
keeps left loses lost makes many more now of others sells she that the their them then they this time times to total
twice was were what with
"""
SIGNS = ["####", "\\boxed{", "<<", ">>", "\n\n", "\n", " =", *" .,:;?!'\"$%+-*/=()[]{}<>#_\\^"]

# a sign, a number of one or two digits or a word (both with the space before them), else a single character, so that
# no text of the user can spell a byte token such as `<0x41>` in one piece
PIECES = r"####|\\boxed\{|<<|>>|\n\n| =| ?[0-9]{1,2}| ?[A-Za-z]+|[\s\S]"


def vocabulary() -> dict[str, int]:
    """Piece to id: padding 0, end 1, the 256 bytes, then the grammar."""
    numbers = [f"{space}{n}" for space in ("", " ") for n in range(100)]
    both = [f"{space}{word}" for space in ("", " ") for word in f"{NAMES} {OPENERS}".split()]
    spaced = [f" {word}" for word in WORDS.split()]
    pieces = [PAD, EOS, *(f"<0x{byte:02X}>" for byte in range(256)), *SIGNS, *numbers, *both, *spaced]
    return {piece: index for index, piece in enumerate(pieces)}


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Tokenizer of the stand-in grammar; `decode(encode(text)) == text` for every text.

    It adds neither a beginning nor an end token, and `<eos>` written out in a text is ordinary characters: only the
    policy can end a response.
    """
    backend = Tokenizer(models.BPE(vocabulary(), merges=[], ignore_merges=True, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(PIECES), "isolated")
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens([AddedToken(PAD, special=True), AddedToken(EOS, special=True)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=EOS,
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
    )
