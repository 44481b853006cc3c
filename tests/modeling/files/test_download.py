"""From the Hub comes what is wanted, and nothing else: the Hub's real client against a server on this machine."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import quote
from urllib.request import urlopen

import pytest
import torch
from huggingface_hub import save_torch_state_dict
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from flexolmo_hf import FlexOlmoForCausalLM
from flexolmo_hf.errors import FlexOlmoError, UnknownArgumentError
from flexolmo_hf.modeling.files.download import fetch_part, local_part
from tests.conftest import as_one_file, dense_model
from tests.modeling.files.hub_server import Hub, Repository, serve
from tests.modeling.test_expert_sets import named_model

ROOT = Path(__file__).resolve().parents[3]
TWO = ["public", "math"]
IDS = [[5, 17, 41, 3, 88, 29, 60]]


def expert_file(name):
    return f"model-expert-{name}-00001-of-00001.safetensors"


SHARED = "model-shared-00001-of-00001.safetensors"
SETTINGS = ["config.json", "generation_config.json", "model.safetensors.index.json"]


def change_settings(folder, **changes):
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, **changes}))


def make_repositories(place):
    """Build every checkpoint the client asks for; where it shall be like a folder, the folder is what is served."""
    model = named_model()
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(place / "merged")
    # Whoever opens what was left out in every test, finds no weights there.
    (place / "merged" / expert_file("news")).write_bytes(b"garbage")
    named_model().save_pretrained(place / "merged-v1")
    shutil.copytree(place / "merged", place / "nested" / "deep" / "sub")
    shutil.copytree(place / "merged", place / "narrow")
    change_settings(place / "narrow", active_experts=TWO)
    named_model().save_pretrained(place / "one-file")
    as_one_file(place / "one-file")
    named_model().config.save_pretrained(place / "shards")
    save_torch_state_dict(model.state_dict(), place / "shards", max_shard_size="60KB")
    named_model().save_pretrained(place / "variant", max_shard_size="60KB", variant="half")
    shutil.copytree(place / "merged", place / "named-index")
    (place / "named-index" / SETTINGS[-1]).rename(place / "named-index" / "other.safetensors.index.json")
    change_settings(place / "named-index", transformers_weights="other.safetensors.index.json")
    shutil.copytree(place / "one-file", place / "named-file")
    (place / "named-file" / "model.safetensors").rename(place / "named-file" / "other.safetensors")
    change_settings(place / "named-file", transformers_weights="other.safetensors")
    shutil.copytree(place / "merged", place / "leading-out")
    index = {"metadata": {"total_size": 0}, "weight_map": {"model.embed_tokens.weight": "../merged/" + SHARED}}
    (place / "leading-out" / SETTINGS[-1]).write_text(json.dumps(index))
    shutil.copytree(place / "merged", place / "gap")
    (place / "gap" / expert_file("math")).unlink()
    dense_model().save_pretrained(place / "dense")
    if find_spec("peft"):
        save_adapter(place / "adapter")
    repositories = {
        f"lab/{folder.name}": Repository({"main": folder}) for folder in place.iterdir() if folder.name != "merged-v1"
    }
    repositories["lab/merged"] = Repository({"main": place / "merged", "v1": place / "merged-v1"})
    repositories["lab/private"] = Repository({"main": place / "merged"}, token="hf_right")
    here, there = place / "merged", place / "merged-v1"
    repositories["lab/moving"] = Repository({"main": here, "first": here, "next": there}, moves=True)
    return repositories


def save_adapter(folder):
    from peft import LoraConfig, get_peft_model

    model = named_model()
    model.name_or_path = "lab/merged"
    get_peft_model(model, LoraConfig(target_modules=["q_proj"])).save_pretrained(folder, save_embedding_layers=False)


def compared(repository, folder, experts=TWO, load=AutoModelForCausalLM.from_pretrained, **options):
    """Load from the Hub and from the folder that is served, and say what came."""
    chosen = {} if experts == "as the settings say" else {"active_experts": experts}
    model = load(repository, **chosen, **options)
    local = AutoModelForCausalLM.from_pretrained(folder, **chosen, variant=options.get("variant"))
    with torch.no_grad():
        equal = torch.equal(model(torch.tensor(IDS)).logits, local(torch.tensor(IDS)).logits)
    names = {model.config.name_or_path, model.name_or_path, model.model.name_or_path}
    return {"equal": equal, "experts": model.expert_names, "names": sorted(names), "limit": limit_of(model)}


def limit_of(model):
    return model.generation_config.max_new_tokens


def online(place, commit, hub):
    """Return what the client does while the server is there, by the name of the phase."""
    merged, cold = place / "merged", {"cache_dir": place / "other-cache"}
    direct = FlexOlmoForCausalLM.from_pretrained

    def backbone():
        model = AutoModel.from_pretrained("lab/merged", active_experts=["math"], cache_dir=place / "third-cache")
        return {"experts": model.expert_names, "names": [model.name_or_path]}

    def with_configuration():
        config = AutoConfig.from_pretrained("lab/merged", active_experts=["public", "code"])
        return compared("lab/merged", merged, ["public", "code"], config=config, cache_dir=place / "fourth-cache")

    def fetched_alone():
        folder = fetch_part("lab/merged", active_experts=TWO, cache_dir=place / "fifth-cache")
        return {"commit": folder.name, "files": sorted(path.name for path in folder.iterdir())}

    def fetched_for_one_process():
        options = {"active_experts": TWO, "distributed_config": {"tp_size": 2, "ep_size": 2}}
        part = local_part("lab/merged", {**options, "cache_dir": place / "tenth-cache"})
        return {"files": sorted(path.name for path in part.path.iterdir())}

    def shadowed():
        shutil.copytree(merged, "lab/shards")
        return compared("lab/shards", merged)

    def live():
        model = AutoModelForCausalLM.from_pretrained(
            "lab/private", active_experts=TWO, token="hf_right", cache_dir=place / "ninth-cache"
        )
        urlopen(f"{hub}/phase/loaded").close()
        model.load_expert("code", token="hf_right")
        local = AutoModelForCausalLM.from_pretrained(merged, active_experts=[*TWO, "code"])
        with torch.no_grad():
            equal = torch.equal(model(torch.tensor(IDS)).logits, local(torch.tensor(IDS)).logits)
        return {"equal": equal, "experts": model.expert_names}

    return {
        "live": live,
        "auto": lambda: compared("lab/merged", merged),
        "again": lambda: compared("lab/merged", merged),
        "one more": lambda: compared("lab/merged", merged, [*TWO, "code"]),
        "class": lambda: compared("lab/merged", merged, load=direct, **cold),
        "backbone": backbone,
        "configuration": with_configuration,
        "name of a configuration": lambda: compared(
            "lab/merged", merged, load=direct, config="lab/narrow", cache_dir=place / "sixth-cache"
        ),
        "fetched alone": fetched_alone,
        "fetched for one process": fetched_for_one_process,
        "tag": lambda: compared("lab/merged", place / "merged-v1", revision="v1"),
        "commit": lambda: compared("lab/merged", place / "merged-v1", revision=commit, load=direct, **cold),
        "moving": lambda: compared("lab/moving", merged, load=direct),
        "no such revision": lambda: compared("lab/merged", merged, load=direct, revision="v2"),
        "subfolder": lambda: compared("lab/nested", merged, subfolder="deep/sub"),
        "subfolder, class": lambda: compared("lab/nested", merged, load=direct, subfolder="deep/sub", **cold),
        "private, no token": lambda: compared("lab/private", merged, load=direct),
        "private, wrong token": lambda: compared("lab/private", merged, load=direct, token="hf_wrong"),
        "private": lambda: compared("lab/private", merged, token="hf_right"),
        "private, class": lambda: compared("lab/private", merged, load=direct, token="hf_right", **cold),
        "no such repository": lambda: compared("lab/nothing", merged, load=direct),
        "settings": lambda: compared("lab/narrow", place / "narrow", "as the settings say"),
        "one file": lambda: compared("lab/one-file", place / "one-file"),
        "shards": lambda: compared("lab/shards", place / "shards"),
        "variant": lambda: compared("lab/variant", place / "variant", variant="half"),
        "named index": lambda: compared("lab/named-index", place / "named-index"),
        "named file": lambda: compared("lab/named-file", place / "named-file"),
        "forced": lambda: compared("lab/merged", merged, load=direct, force_download=True, **cold),
        "local files only": lambda: compared("lab/merged", merged, load=direct, local_files_only=True, **cold),
        "unknown expert": lambda: compared("lab/gap", merged, ["public", "maht"]),
        "unknown expert, class": lambda: compared("lab/gap", merged, ["public", "maht"], load=direct, **cold),
        "missing shard": lambda: compared("lab/gap", merged),
        "leading out": lambda: compared("lab/leading-out", merged),
        "dense": lambda: compared("lab/dense", merged, load=direct),
        "shadowed": shadowed,
        "adapter": lambda: with_adapter(AutoModelForCausalLM, place / "seventh-cache"),
        "adapter, class": lambda: with_adapter(FlexOlmoForCausalLM, place / "eighth-cache"),
    }


def offline(place, commit, hub):
    """Return what the client does when it may not ask."""
    merged = place / "merged"
    return {
        "cached": lambda: compared("lab/merged", merged, TWO),
        "cached, class": lambda: compared("lab/merged", merged, TWO, load=FlexOlmoForCausalLM.from_pretrained),
        "cached tag": lambda: compared("lab/merged", place / "merged-v1", TWO, revision="v1"),
        "never downloaded": lambda: compared("lab/merged", merged, ["public", "news"]),
    }


def with_adapter(loader, cache):
    model = loader.from_pretrained("lab/adapter", active_experts=TWO, cache_dir=cache)
    return {"experts": model.expert_names, "adapter": any("lora_A" in name for name, _ in model.named_parameters())}


def run_client(url, place, commit, phases):
    """Be the client: run each phase and print what came of it."""
    results = {}
    for name, act in {"online": online, "offline": offline}[phases](Path(place), commit, url).items():
        urlopen(f"{url}/phase/{quote(name)}").close()
        try:
            results[name] = act()
        except Exception as error:
            results[name] = {
                "error": type(error).__name__,
                "ours": isinstance(error, FlexOlmoError),
                "says": str(error),
            }
    print("RESULTS" + json.dumps(results))


def client(hub, place, commit, phases):
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith("HF_")},
        "PYTHONPATH": str(ROOT),
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(place / "home"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "1" if phases == "offline" else "0",
    }
    arguments = [hub.url, str(place), commit, phases]
    (place / "at-work").mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-c", f"from tests.modeling.files.test_download import run_client; run_client(*{arguments})"],
        cwd=place / "at-work",
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "RESULTS" in done.stdout, done.stdout + done.stderr
    return json.loads(done.stdout.partition("RESULTS")[2])


@dataclass(frozen=True)
class Seen:
    """What the client got in each phase, and what the server was asked for."""

    results: dict
    hub: Hub

    def loaded(self, phase, experts=TWO, repository="lab/merged", limit=None):
        """Assert that the phase loaded these experts as the folder would, under the repository's name."""
        expected = {"equal": True, "experts": list(experts), "names": [repository], "limit": limit}
        assert self.results[phase] == expected

    def downloaded(self, phase, repository="lab/merged"):
        """Return the files of a repository that were downloaded in a phase, and assert that it was the only one."""
        owners, files = zip(*(entry.split(":") for entry in self.hub.downloaded(phase)), strict=True)
        assert set(owners) == {repository}
        return list(files)

    def refused(self, phase):
        """Return the kind and the text of a refusal, and assert that no weights were downloaded before it."""
        assert not [file for file in self.hub.downloaded(phase) if file.endswith(".safetensors")]
        return self.results[phase]["error"], self.results[phase]["says"]


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("place")
    repositories = make_repositories(place)
    commit = repositories["lab/merged"].commit("v1")
    with serve(repositories) as hub:
        results = client(hub, place, commit, "online")
        results |= client(hub, place, commit, "offline")
    return Seen(results, hub)


WANTED_WEIGHTS = [expert_file("math"), expert_file("public"), SHARED]
WANTED = sorted([*SETTINGS, *WANTED_WEIGHTS])


@pytest.mark.parametrize("phase", ["auto", "class"])
def test_only_files_with_something_wanted_are_downloaded(seen, phase):
    seen.loaded(phase, limit=7)

    assert seen.downloaded(phase) == WANTED


@pytest.mark.parametrize("phase", ["auto", "class"])
def test_nothing_is_asked_about_files_of_experts_that_were_left_out(seen, phase):
    asked = {what.removeprefix("lab/merged:") for what in seen.hub.asked(phase)}
    # The Auto classes ask for the commit; whether there is an adapter is asked only where PEFT is installed.
    listings = {"lab/merged tree"} | ({"lab/merged info"} if phase == "auto" else set())

    assert asked - {"adapter_config.json"} == {*WANTED, "model.safetensors"} | listings


def test_what_is_in_the_cache_is_not_downloaded_again(seen):
    seen.loaded("again", limit=7)

    assert seen.hub.asked("again") == {"lab/merged info"}


def test_another_expert_wanted_later_costs_its_own_files(seen):
    seen.loaded("one more", [*TWO, "code"], limit=7)

    assert seen.downloaded("one more") == [expert_file("code")]


def test_an_expert_loaded_into_a_live_model_costs_its_own_files(seen):
    assert seen.results["live"] == {"equal": True, "experts": [*TWO, "code"]}
    assert seen.downloaded("loaded", "lab/private") == [expert_file("code")]


def test_a_model_without_a_head_is_downloaded_in_part_too(seen):
    assert seen.results["backbone"] == {"experts": ["math"], "names": ["lab/merged"]}
    assert expert_file("public") not in seen.downloaded("backbone")


def test_a_configuration_given_along_says_what_is_wanted(seen):
    seen.loaded("configuration", ["public", "code"], limit=7)

    assert [file for file in seen.downloaded("configuration") if "expert" in file] == [
        expert_file("code"),
        expert_file("public"),
    ]


def test_the_settings_of_another_repository_can_say_what_is_wanted(seen):
    seen.loaded("name of a configuration", limit=7)
    files = [entry for entry in seen.hub.downloaded("name of a configuration") if "expert" in entry]

    assert files == [f"lab/merged:{expert_file(name)}" for name in ("math", "public")]


def test_the_settings_of_the_repository_say_what_is_wanted_where_the_call_does_not(seen):
    seen.loaded("settings", repository="lab/narrow", limit=7)

    assert seen.downloaded("settings", "lab/narrow") == WANTED


def test_a_part_can_be_downloaded_without_being_loaded(seen):
    files = seen.results["fetched alone"]["files"]

    assert files == WANTED == seen.downloaded("fetched alone")
    assert seen.results["fetched alone"]["commit"] == seen.hub.repositories["lab/merged"].commit("main")


def test_a_process_downloads_no_expert_that_another_one_holds(seen):
    own = [file for file in WANTED if file != expert_file("math")]

    assert seen.results["fetched for one process"]["files"] == own == seen.downloaded("fetched for one process")


@pytest.mark.parametrize("phase", ["tag", "commit"])
def test_a_revision_is_another_checkpoint_of_the_same_name(seen, phase):
    seen.loaded(phase)

    # What both commits have in common, the cache keeps once.
    assert [file for file in seen.downloaded(phase) if file.endswith(".safetensors")] == WANTED_WEIGHTS


def test_all_files_come_from_one_commit_even_if_the_branch_moves_on(seen):
    seen.loaded("moving", repository="lab/moving", limit=7)

    assert seen.downloaded("moving", "lab/moving") == WANTED


@pytest.mark.parametrize("phase", ["subfolder", "subfolder, class"])
def test_a_checkpoint_may_lie_in_a_folder_of_the_repository(seen, phase):
    seen.loaded(phase, repository="lab/nested", limit=7)

    assert seen.downloaded(phase, "lab/nested") == [f"deep/sub/{file}" for file in WANTED]


@pytest.mark.parametrize("phase", ["private", "private, class"])
def test_a_private_repository_opens_to_its_token(seen, phase):
    seen.loaded(phase, repository="lab/private", limit=7)

    assert seen.downloaded(phase, "lab/private") == WANTED


@pytest.mark.parametrize(
    "phase", ["private, no token", "private, wrong token", "no such repository", "no such revision"]
)
def test_what_is_out_of_reach_is_reported_as_not_found(seen, phase):
    error, text = seen.refused(phase)

    assert error == "CheckpointNotFoundError"
    assert "There is no checkpoint 'lab/" in text


def test_a_checkpoint_of_one_file_is_downloaded_as_it_is(seen):
    seen.loaded("one file", repository="lab/one-file")

    assert seen.downloaded("one file", "lab/one-file") == ["config.json", "generation_config.json", "model.safetensors"]


def test_settings_can_name_the_weights(seen):
    seen.loaded("named index", repository="lab/named-index", limit=7)
    seen.loaded("named file", repository="lab/named-file")
    index = [file for file in seen.downloaded("named index", "lab/named-index") if file not in SETTINGS]

    assert index == [*WANTED_WEIGHTS, "other.safetensors.index.json"]
    assert "other.safetensors" in seen.downloaded("named file", "lab/named-file")


def test_a_forced_download_is_partial_too(seen):
    seen.loaded("forced", limit=7)

    assert seen.downloaded("forced") == WANTED


def test_what_was_downloaded_loads_without_a_request_when_only_local_files_are_allowed(seen):
    seen.loaded("local files only", limit=7)

    assert not seen.hub.asked("local files only")


@pytest.mark.parametrize("phase", ["shards", "variant"])
def test_of_mixed_shards_those_with_something_wanted_are_downloaded(seen, phase):
    seen.loaded(phase, repository=f"lab/{phase}")
    folder = seen.hub.repositories[f"lab/{phase}"].revisions["main"]
    (index,) = folder.glob("*.index*.json")
    wanted = {
        file
        for key, file in json.loads(index.read_text())["weight_map"].items()
        if ".mlp.experts." not in key or ".experts.0." in key or ".experts.1." in key
    }
    every = {path.name for path in folder.glob("*.safetensors")}
    downloaded = {file for file in seen.downloaded(phase, f"lab/{phase}") if file.endswith(".safetensors")}

    assert downloaded == wanted < every


@pytest.mark.parametrize("phase", ["unknown expert", "unknown expert, class"])
def test_an_unknown_expert_is_refused_before_any_weights_are_downloaded(seen, phase):
    error, text = seen.refused(phase)

    assert error == "UnknownExpertError"
    assert "Did you mean 'math'" in text


def test_another_architecture_is_refused_before_any_weights_are_downloaded(seen):
    assert seen.refused("dense")[0] == "NotFlexOlmoError"


def test_an_index_that_leads_out_of_the_folder_is_refused(seen):
    assert seen.refused("leading out")[0] == "DamagedFileError"


def test_a_file_that_the_repository_lacks_is_named(seen):
    assert seen.results["missing shard"]["ours"]
    assert expert_file("math") in seen.results["missing shard"]["says"]


def test_a_folder_of_the_same_name_goes_before_the_repository(seen):
    assert seen.results["shadowed"]["equal"]
    assert not seen.hub.asked("shadowed")


@pytest.mark.parametrize("phase", ["adapter", "adapter, class"])
def test_the_model_an_adapter_belongs_to_is_downloaded_in_part_too(seen, phase):
    pytest.importorskip("peft")
    assert seen.results[phase] == {"experts": TWO, "adapter": True}
    downloaded = [entry for entry in seen.hub.downloaded(phase) if "expert-" in entry]

    assert downloaded == [f"lab/merged:{expert_file(name)}" for name in ("math", "public")]


@pytest.mark.parametrize(("phase", "limit"), [("cached", 7), ("cached, class", 7), ("cached tag", None)])
def test_what_was_downloaded_loads_offline_without_a_request(seen, phase, limit):
    seen.loaded(phase, limit=limit)

    assert not seen.hub.asked(phase)


def test_an_expert_that_was_never_downloaded_is_missed_offline(seen):
    error, _ = seen.refused("never downloaded")

    assert error == "CheckpointNotFoundError"
    assert not seen.hub.asked("never downloaded")


def test_an_option_that_nothing_reads_is_refused():
    with pytest.raises(UnknownArgumentError, match="Did you mean 'active_experts'"):
        fetch_part("lab/merged", active_expert=["public"])


def test_anything_but_a_repository_is_left_alone(tmp_path):
    named_model().save_pretrained(tmp_path)

    for path in (None, tmp_path):
        part = local_part(path, {"revision": "v1"})
        assert (part.path, part.keywords, part.repository) == (path, {"revision": "v1"}, None)
