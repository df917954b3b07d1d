"""Impossible values of the `hub:` section."""

import pytest

from neox_hf.checkpoint.settings import HubSettings
from neox_hf.errors import RecipeError


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"push": True}, "hub.push is true but hub.repo_id is missing; set hub.repo_id=owner/name"),
        ({"repo_id": "no-owner"}, "hub.repo_id='no-owner' is not of the form owner/name"),
        ({"repo_id": "a/b/c"}, "hub.repo_id='a/b/c' is not of the form owner/name"),
        ({"timeout": 0.0}, "hub.timeout=0.0 must be a positive number of seconds"),
        ({"attempts": 0}, "hub.attempts=0 must be at least 1"),
        ({"retry_wait": -1.0}, "hub.retry_wait=-1.0 must be a number of seconds of at least 0"),
        ({"wait_at_end": -1.0}, "hub.wait_at_end=-1.0 must be a number of seconds of at least 0"),
    ],
)
def test_an_impossible_value_is_a_recipe_error(values, message):
    with pytest.raises(RecipeError) as caught:
        HubSettings(**values)
    assert message in str(caught.value)


def test_the_defaults_publish_nothing():
    assert HubSettings().push is False
