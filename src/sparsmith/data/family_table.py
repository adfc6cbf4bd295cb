"""Well-known data sets by family: under which names they go, and in which public training mixture they stand.

A family is a data set in all its forms: splits, prompt templates, rationales written for it, translations into questions and answers. What
is evaluated on a family that was trained on is no held-out result, whichever rows were drawn.

The parts of the FLAN 2022 collection are as its repository lists them (google-research/FLAN, `flan/v2/flan_collection_info.csv`); families
that nobody evaluates on (translation pairs, part-of-speech tagging, ...) are left out.
"""

from __future__ import annotations

ALIASES: dict[str, tuple[str, ...]] = {
    # mathematics
    "gsm8k": ("gsm8k", "gsm", "grade_school_math"),
    "aqua": ("aqua", "aqua_rat"),
    "svamp": ("svamp",),
    "asdiv": ("asdiv",),
    "mawps": ("mawps",),
    "math_qa": ("math_qa",),
    "deepmind_math": ("math_dataset", "mathematics_dataset", "deepmind_math"),
    "hendrycks_math": ("hendrycks_math", "competition_math", "math_500"),
    "mgsm": ("mgsm",),
    # questions about the world and science
    "mmlu": ("mmlu", "mmmlu", "hendrycks_test"),
    "arc": ("arc", "ai2_arc", "arc_easy", "arc_challenge", "arc_e", "arc_c"),
    "openbookqa": ("openbookqa", "obqa"),
    "unifiedqa_science": ("unified_qa_science", "unified_qa_science_inst", "ai2_science"),
    "sciq": ("sciq",),
    "qasc": ("qasc", "eqasc"),
    "boolq": ("boolq",),
    "strategyqa": ("strategyqa",),
    "natural_questions": ("natural_questions", "naturalquestion", "nq_open"),
    "qed": ("qed",),
    "trivia_qa": ("trivia_qa",),
    "web_questions": ("web_questions", "webquestion"),
    "wiki_qa": ("wiki_qa",),
    "hotpot_qa": ("hotpot_qa",),
    "wiki_hop": ("wiki_hop",),
    "tydiqa": ("tydiqa",),
    "squad": ("squad", "squad1", "squad2", "squad_v1", "squad_v2"),
    "drop": ("drop",),
    "multirc": ("multirc",),
    "record": ("record",),
    "race": ("race",),
    "quac": ("quac",),
    "coqa": ("coqa",),
    "adversarial_qa": ("adversarial_qa",),
    "duorc": ("duorc",),
    "dream": ("dream",),
    "quail": ("quail",),
    "quarel": ("quarel",),
    "quartz": ("quartz",),
    "quoref": ("quoref",),
    "ropes": ("ropes",),
    "wiqa": ("wiqa",),
    # common sense
    "commonsense_qa": ("commonsense_qa", "csqa", "cos_e", "ecqa"),
    "commonsense_qa2": ("commonsense_qa2", "csqa2"),
    "creak": ("creak",),
    "sensemaking": ("sensemaking", "comve"),
    "cosmos_qa": ("cosmos_qa",),
    "social_iqa": ("social_iqa", "siqa"),
    "piqa": ("piqa",),
    "winogrande": ("winogrande",),
    "wsc": ("wsc", "wsc273", "winograd_wsc"),
    "hellaswag": ("hellaswag",),
    "story_cloze": ("story_cloze",),
    "copa": ("copa",),
    "lambada": ("lambada",),
    "bbh": ("bbh", "bigbench_hard"),
    "truthful_qa": ("truthful_qa",),
    # inference, paraphrase, words
    "anli": ("anli",),
    "mnli": ("mnli", "multi_nli"),
    "snli": ("snli", "esnli"),
    "qnli": ("qnli",),
    "rte": ("rte",),
    "cb": ("cb", "commitment_bank"),
    "wnli": ("wnli",),
    "wic": ("wic",),
    "paws": ("paws",),
    "mrpc": ("mrpc",),
    "qqp": ("qqp",),
    "stsb": ("stsb",),
    "cola": ("cola",),
    "trec": ("trec",),
    # sentiment, topics
    "imdb": ("imdb",),
    "sst2": ("sst2",),
    "yelp": ("yelp",),
    "sentiment140": ("sentiment140",),
    "amazon_polarity": ("amazon_polarity",),
    "app_reviews": ("app_reviews", "app_review"),
    "ag_news": ("ag_news",),
    "dbpedia": ("dbpedia", "dbpedia_14"),
    # writing
    "aeslc": ("aeslc",),
    "cnn_dailymail": ("cnn_dailymail",),
    "gigaword": ("gigaword",),
    "multi_news": ("multi_news",),
    "newsroom": ("newsroom",),
    "samsum": ("samsum",),
    "xsum": ("xsum",),
    "common_gen": ("common_gen",),
    "e2e_nlg": ("e2e_nlg",),
    "dart": ("dart",),
    "web_nlg": ("web_nlg",),
    "wiki_bio": ("wiki_bio",),
    # code
    "mbpp": ("mbpp",),
    "humaneval": ("humaneval",),
    "code_contests": ("code_contests", "dmcc_python"),
    "nl2bash": ("nl2bash",),
}
"""Family -> its names. Small letters and digits alone count: `bool_q`, `BoolQ` and `boolq_test` are one."""

_COT = "gsm8k strategyqa aqua creak commonsense_qa snli qasc qed sensemaking"

_MUFFIN = """
    aeslc ag_news anli arc boolq cb cnn_dailymail cola common_gen copa coqa cosmos_qa dart drop e2e_nlg gigaword mrpc qqp hellaswag imdb
    lambada deepmind_math mnli multi_news multirc natural_questions newsroom openbookqa paws piqa qnli quac record rte samsum sentiment140
    snli squad sst2 story_cloze stsb trec trivia_qa unifiedqa_science web_nlg wic winogrande wnli wsc xsum yelp code_contests
"""

_T0 = """
    adversarial_qa amazon_polarity app_reviews commonsense_qa dbpedia dream duorc hotpot_qa qasc quail quarel quartz quoref race ropes sciq
    social_iqa web_questions wiki_bio wiki_hop wiki_qa wiqa
    ag_news anli arc boolq cb cnn_dailymail cola common_gen copa cosmos_qa drop gigaword mrpc qqp hellaswag imdb lambada multi_news multirc
    natural_questions openbookqa paws piqa qnli quac record rte samsum squad sst2 story_cloze stsb trec trivia_qa wic winogrande wsc xsum
    yelp
"""

_NIV2 = """
    adversarial_qa ag_news amazon_polarity anli app_reviews aqua arc asdiv boolq cb cnn_dailymail cola common_gen commonsense_qa copa coqa
    cosmos_qa creak dart dbpedia deepmind_math dream drop duorc e2e_nlg gigaword hellaswag hotpot_qa imdb math_qa mawps mnli mrpc multi_news
    multirc natural_questions openbookqa paws piqa qasc qed qqp quail quarel quartz quoref race record ropes rte samsum sciq sensemaking
    sentiment140 snli social_iqa squad sst2 story_cloze strategyqa stsb svamp trec trivia_qa web_nlg web_questions wiki_hop wiki_qa
    winogrande wiqa wsc xsum yelp
"""

SUBMIXTURES: dict[str, tuple[str, ...]] = {
    "cot": tuple(_COT.split()),
    "muffin": tuple(_MUFFIN.split()),
    "t0": tuple(_T0.split()),
    "niv2": tuple(_NIV2.split()),
}
"""Part of the FLAN 2022 collection -> its families. NIv2 without its 57 MMLU tasks, as the collection has it."""

BUNDLES: dict[str, tuple[str, ...]] = {
    "flan2022": ("cot", "muffin", "t0", "niv2"),
    "flan2021": ("muffin",),
    "cot": ("cot",),
    "muffin": ("muffin",),
    "t0": ("t0",),
    "p3": ("t0",),
    "niv2": ("niv2",),
    "superni": ("niv2",),
}
"""Name of a mixture that is used as a source, or as a preset -> its parts."""

BUNDLE_ALIASES: dict[str, tuple[str, ...]] = {
    "flan2022": ("flan2022", "flan_v2", "flan_collection"),
    "flan2021": ("flan2021", "flan_v1"),
    "muffin": ("muffin",),
    "t0": ("t0", "t0_sf"),
    "p3": ("p3",),
    "niv2": ("niv2", "natural_instructions", "super_natural_instructions"),
    "superni": ("superni", "sni"),
}
"""Bundle -> names of sources by which it is known. `cot` is none of them: it stands in the names of many single sets."""

MMLU_IN_NIV2 = frozenset([*range(664, 668), *range(685, 738)])
"""Numbers of the NIv2 tasks that hold MMLU: 57, one for each subject."""

SPLIT_WORDS = frozenset(
    [
        "train",
        "training",
        "test",
        "testing",
        "dev",
        "val",
        "valid",
        "validation",
        "eval",
        "evaluation",
        "heldout",
        "held",
        "out",
        "part",
        "full",
        "split",
        "small",
        "cot",
    ]
)
"""Words of a source's name that tell the split and not the data set."""
