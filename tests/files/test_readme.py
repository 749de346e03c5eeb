"""A README is replaced only where this library wrote it, to the last character."""

import pytest
from model_cards import card_of, save

import lowrank
from lowrank.files.readme import is_own_card, write_card


@pytest.mark.parametrize("text", ["# Mine\n", ""], ids=["text", "empty"])
def test_a_readme_of_the_users_stays(text, tiny_bert, tmp_path):
    (tmp_path / "README.md").write_text(text, encoding="utf-8")
    lowrank.compress(tiny_bert, rank=8)
    save(tiny_bert, tmp_path)
    assert card_of(tmp_path) == text


def test_a_readme_of_the_users_stays_beside_a_module(mlp, tmp_path):
    (tmp_path / "README.md").write_text("# Mine\n", encoding="utf-8")
    lowrank.save(mlp, tmp_path, overwrite=True)
    assert card_of(tmp_path) == "# Mine\n"


def test_a_card_that_somebody_has_edited_stays(tiny_bert, tmp_path):
    lowrank.compress(tiny_bert, rank=8)
    save(tiny_bert, tmp_path)
    edited = card_of(tmp_path).replace("## Load it", "My notes.\n\n## Load it")
    (tmp_path / "README.md").write_text(edited, encoding="utf-8")
    save(tiny_bert, tmp_path)
    assert card_of(tmp_path) == edited


def test_a_card_of_an_older_save_is_written_anew(tiny_bert, tmp_path):
    lowrank.compress(tiny_bert, rank=16)
    save(tiny_bert, tmp_path)
    lowrank.compress(lowrank.decompress(tiny_bert), rank=8)
    save(tiny_bert, tmp_path)
    assert "rank=8" in card_of(tmp_path)
    assert "rank=16" not in card_of(tmp_path)


def test_a_readme_that_is_a_link_is_not_followed(tiny_bert, tmp_path):
    write_card(tmp_path, "# Elsewhere\n")
    elsewhere = (tmp_path / "README.md").rename(tmp_path / "elsewhere.md")
    folder = tmp_path / "saved"
    folder.mkdir()
    (folder / "README.md").symlink_to(elsewhere)
    before = elsewhere.read_bytes()
    save(lowrank.compress(tiny_bert, rank=8), folder)
    assert elsewhere.read_bytes() == before


def test_a_card_with_one_other_character_is_not_ours(tmp_path):
    write_card(tmp_path, "# Card\n")
    file = tmp_path / "README.md"
    assert is_own_card(file)
    for change in (lambda text: text + "\n", lambda text: text.replace("# Card", "# Cart")):
        write_card(tmp_path, "# Card\n")
        file.write_text(change(file.read_text(encoding="utf-8")), encoding="utf-8")
        assert not is_own_card(file)
        file.unlink()
