"""The corpora that the tests share."""

import functools

import pytest

from test.egs.corpora import SMALL, copy_recipe, data_sh


@pytest.fixture(scope="session")
def make(tmp_path_factory):
    """Gives a corpus's recipe with all its data made, each made once."""

    @functools.cache
    def make(corpus):
        if corpus != "fsdd":
            pytest.importorskip("espeakng_loader")
        folder = copy_recipe(corpus, tmp_path_factory.mktemp(corpus))
        status, out, err = data_sh(folder, SMALL[corpus])
        assert status == 0, err
        assert len(out.splitlines()) == len([p for p in (folder / "data").iterdir() if p.is_dir()])
        return folder

    return make
