import json
import subprocess

import pytest

from budgetguard.cli.local.binaries import envoy_binary
from budgetguard.core.catalog import ProviderSpec
from control_plane.jobs.clusters import ProviderUrlError, cluster_of, clusters_file, find_ca_bundle, write_clusters


def provider(base_url, provider_id="openai"):
    return ProviderSpec(
        provider_id=provider_id,
        kind="openai",
        base_url=base_url,
        api_key_env="OPENAI_API_KEY",
        cluster=f"provider-{provider_id}",
    )


@pytest.fixture
def ca_bundle(tmp_path):
    found = find_ca_bundle()
    assert found is not None, "this machine has no file of certificate authorities"
    return found


def test_envoy_takes_the_clusters_as_they_are_written(tmp_path, ca_bundle):
    urls = ["https://api.openai.com", "https://10.1.2.3:8443/v1", "http://127.0.0.1:8080", "http://vllm.internal/v1"]
    providers = [provider(url, f"p{number}") for number, url in enumerate(urls)]
    written = json.loads(clusters_file(providers, version=7, ca_bundle=ca_bundle))
    assert written["versionInfo"] == "7"
    configuration = {"static_resources": {"clusters": written["resources"]}}
    for cluster in configuration["static_resources"]["clusters"]:
        cluster.pop("@type")
    path = tmp_path / "clusters.json"
    path.write_text(json.dumps(configuration))
    result = subprocess.run(
        [str(envoy_binary()), "--mode", "validate", "-c", str(path)], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr


def test_an_upstream_must_prove_its_name(ca_bundle):
    cluster = cluster_of(provider("https://api.openai.com"), ca_bundle=ca_bundle).to_dict()
    context = cluster["transportSocket"]["typedConfig"]
    assert context["sni"] == "api.openai.com"
    validation = context["commonTlsContext"]["validationContext"]
    assert validation["matchTypedSubjectAltNames"] == [{"sanType": "DNS", "matcher": {"exact": "api.openai.com"}}]
    assert validation["trustedCa"]["filename"] == str(ca_bundle)
    plain = cluster_of(provider("http://127.0.0.1:9"), ca_bundle=None).to_dict()
    assert "transportSocket" not in plain


@pytest.mark.parametrize(
    "url",
    [
        "",
        "api.openai.com",
        "ftp://x",
        "https://",
        "https://user@host",
        "https://h?x=1",
        "https://h:99999",
        "https://h#f",
    ],
)
def test_what_is_no_base_url_is_told(url, ca_bundle):
    with pytest.raises(ProviderUrlError, match="expected"):
        cluster_of(provider(url), ca_bundle=ca_bundle)


def test_without_authorities_nothing_is_trusted():
    with pytest.raises(ProviderUrlError, match="certificate authorities"):
        cluster_of(provider("https://api.openai.com"), ca_bundle=None)


def test_one_bad_provider_does_not_take_the_others_along(ca_bundle):
    written = json.loads(
        clusters_file([provider("nonsense", "a"), provider("http://b", "b")], version=1, ca_bundle=ca_bundle)
    )
    assert [cluster["name"] for cluster in written["resources"]] == ["provider-b"]


def test_the_file_is_replaced_whole_and_only_when_it_changes(tmp_path):
    path = tmp_path / "clusters.json"
    assert write_clusters(path, "one")
    inode = path.stat().st_ino
    assert not write_clusters(path, "one")
    assert path.stat().st_ino == inode
    assert write_clusters(path, "two")
    assert path.read_text() == "two"
    assert path.stat().st_ino != inode
    assert [entry.name for entry in tmp_path.iterdir()] == ["clusters.json"]
