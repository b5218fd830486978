"""Spaces that word tokenisers put in are taken out, and nothing else."""

import re

import pytest

from sedd.data.detokenize import DETOKENIZERS, detokenize

CASES = [
    ("wikitext", "Teddy 's part @-@ time job , in 1 @,@ 000 or 2 @.@ 5 .", "Teddy's part-time job, in 1,000 or 2.5."),
    ("wikitext", " \n = = Heading = = \n \n He ( or no ) ; why ? \n", "\n== Heading ==\n\nHe (or no); why?\n"),
    ("wikitext", 'she said " yes , " and " no "', 'she said "yes," and "no"'),
    ("wikitext", "the boys ' school , at 5 ° and $ 3 , 50 %", "the boys' school, at 5° and $3, 50%"),
    ("ptb", "it did n't say , mr. <unk> 's $ N million or N %", "it didn't say, mr. <unk>'s $N million or N%"),
    ("lm1b", "They didn 't pay $ 2,900 , she said : Thanks !", "They didn't pay $2,900, she said: Thanks!"),
    ("lm1b", "a three-day trip -- the longest ( so far ) .", "a three-day trip -- the longest (so far)."),
    ("lambada", "“It’s a ‘test’,” he said", "\"It's a 'test',\" he said"),
    ("none", "left , as it is .", "left , as it is ."),
]


@pytest.mark.parametrize(("name", "text", "expected"), CASES)
def test_by_hand(name, text, expected):
    assert detokenize(text, name) == expected


@pytest.mark.parametrize("name", [name for name in DETOKENIZERS if name not in ("none", "lambada")])
def test_only_spaces_and_marks_of_spaces_go(name):
    text = "A \" b \" c ' d 's , e ( f ) @-@ g . \n h ! [ i ] ; j % k n't"

    def bare(words):
        return re.sub(r"\s|@(?=[-,.]@)|(?<=[-,.])@", "", words)

    assert bare(detokenize(text, name)) == bare(text)
    assert detokenize("", name) == ""
