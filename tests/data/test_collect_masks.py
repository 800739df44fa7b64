import pytest

from specdec.data.masking import Masker

SECRETS = {
    "Mail jane.doe+x@mail.example.co.uk today": "Mail <EMAIL> today",
    "müller@bücher.example asks": "<EMAIL> asks",
    "Call (212) 769-5100 now": "Call <PHONE> now",
    "ring +44 20 7702 2020.": "ring <PHONE>.",
    "text me at 4089718523 ok": "text me at <PHONE> ok",
    "Phone: (123) 456-7891": "Phone: <PHONE>",
    "card 4111 1111 1111 1111 exp 12/27": "card <CARD> exp 12/27",
    "card 4111-1111-1111-1111 123": "card <CARD> 123",
    "amex 378282246310005": "amex <CARD>",
    "key sk-proj-abcdefghijkl1234567890?": "key <API_KEY>?",
    "ghp_abcdefghijklmnopqrstuvwxyz0123456789": "<API_KEY>",
    "AKIAIOSFODNN7EXAMPLE": "<API_KEY>",
    "hf_abcdefghijklmnopqrstuvwxyzABCDEFGH": "<API_KEY>",
    "xoxb-123456789012-abcdefABCDEF": "<API_KEY>",
    "AIzaSyA-1234567890abcdefghijklmnopqrstu": "<API_KEY>",
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.dozjgNryP4J3jVm": "<API_KEY>",
    "Authorization: Bearer abcdefghijklmnop123456": "Authorization: Bearer <API_KEY>",
    "https://bob:pa55word@host/x": "https://<API_KEY>@host/x",
    "MY_API_KEY=abcdef1234567890ab": "MY_API_KEY=<API_KEY>",
    "-----BEGIN RSA PRIVATE KEY-----\nMIIEow\nabc=\n-----END RSA PRIVATE KEY-----\nhow?": (
        "<KEY_BLOCK>\nhow?"
    ),
    "cut: -----BEGIN PRIVATE KEY-----\\nMIIEow\\nabc": "cut: <KEY_BLOCK>",
}
# Numbers and words that look alike; the addresses and sums are of kinds that dialogues hold.
HARMLESS = (
    "Where is order 4111111111111112, placed 2026-11-21 10:57:41?",
    "my order 4089718523 is late",
    "call me about order 4089718523",
    "IMEI 490154203237518, tracking 9400111899223197428490, 1Z999AA10123456784",
    "It costs $1,234,567.89, not 5 650 000 or 2100000",
    "The venue is at 1016-1098 North Center Court Street, or 1435 163rd Avenue #23",
    "dlg-881444f3-24fc-4e54-ac61-2196f60e88fa at 192.168.100.200",
    "pi is 3.14159265358979323846, the time 1700000000",
    "roughly 700-1000 calories; valid_date('03-11-2000'); 1234567890123456",
    "a risk-assessment-of-something and sk-learn-something-long-name-here",
    "token: international, password: forgotten, basic understanding-of-things",
    "me@home and @handle, user@localhost",
)


@pytest.mark.parametrize(("text", "masked"), SECRETS.items())
def test_a_secret_is_replaced_by_its_placeholder_and_counted(text, masked):
    masker = Masker()
    assert masker.mask(text) == masked
    assert masker.counts.total() == 1


@pytest.mark.parametrize("text", HARMLESS)
def test_order_numbers_dates_prices_and_addresses_stay(text):
    assert Masker().mask(text) == text


def test_masks_are_not_masked_again():
    masker = Masker()
    once = [masker.mask(text) for text in SECRETS]
    assert [masker.mask(text) for text in once] == once


def test_national_phone_numbers_are_those_of_the_region():
    text = "Ruf an: 030 901820"
    assert Masker().mask(text) == text
    assert Masker("DE").mask(text) == "Ruf an: <PHONE>"
    with pytest.raises(ValueError, match="'Germany' but must be"):
        Masker("Germany")
