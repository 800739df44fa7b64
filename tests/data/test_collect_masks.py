"""Masks for personal data and secrets, and texts that must stay."""

import re

import pytest

from specdec.data.cleaning import Masker

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


def made(length, letters="aB3dE7gH1jK5mN9pQ2rS6tV8wX4zC0yF"):
    """Something random; put together here, so that no scanner takes this file for a leak."""
    return (letters * (length // len(letters) + 1))[:length]


HEX = "0123456789abcdef" * 8
# How keys begin, and how many characters follow.
KEYS = f"""\
ghp_ 36|gho_ 36|ghu_ 36|ghs_ 36|ghr_ 36|github_pat_ 82|glpat- 20|gldt- 20|glrt- 20|xapp-1- 40
sk_{"live"}_ 24|rk_{"live"}_ 24|sk_test_ 24|whsec_ 32|sk- 48|sk-proj- 60|sk-svcacct- 60
sk-ant-api03- 95|sk-or-v1- 64|AIza 35|ya29. 60|GOCSPX- 28|gsk_ 52|xai- 80|nvapi- 64|r8_ 37|hf_ 34
hvs. 90|hvs. 24|hvb. 140|s. 24|dckr_pat_ 27|npm_ 36|pypi-AgEIcHlwaS5vcmc 60|SG.{made(22)}. 43
dp.pt. 43|lin_api_ 40|secret_ 43|ntn_ 46|sq0atp- 22|EAAA 60|NRAK- 27|glsa_ 41|glc_ 60
sntrys_eyJ 100|pplx- 48|fw_ 24|tgp_v1_ 43|tskey-auth- 30|HRKU-AA 58|ATATT3 180|tvly- 32|pcsk_ 60
vcp_ 30|1//0 60|MTA{made(23)}.{made(6)}. 27|123456789:AA 33|ops_ 60|eyJ{made(20)}.eyJ{made(40)}. 43
eyJ{made(40)}..{made(60)}. 22"""
KEYS_IN_HEX = "SK AC key- dapi dop_v1_ shpat_ sbp_ sntryu_ pul- rubygems_"
# Before, the secret, and after it.
NAMED = [
    ("AKIA" + made(16, "ABCD2345") + " ", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYmadeupkey1", ""),
    ("aws_secret_access_key = ", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYmadeupkey1", ""),
    ('"SecretAccessKey": "', "wJalrXUtnFEMI/K7MDENG/bPxRfiCYmadeupkey1", '"'),
    ("AccountName=foo;AccountKey=", made(86) + "==", ";EndpointSuffix=x"),
    ("SharedAccessKeyName=Root;SharedAccessKey=", made(43) + "=", ""),
    ("https://a.blob.core.windows.net/c?sv=2020&sig=", made(43) + "%3D", "&se=2024"),
    ("client secret ", "abc8Q~" + made(34), ""),
    ("Endpoint api-key: ", HEX[:32], ""),
    ("DD_API_KEY=", HEX[:32], ""),
    ("HEROKU_API_KEY=", "12345678-90ab-cdef-1234-567890abcdef", ""),
    ("MISTRAL_API_KEY: ", made(32), ""),
    ("Authorization: Bearer ", "abcdefghijklmnopqrstuvwx", ""),
    ("curl -H 'Authorization: Bearer ", "abcdefghijklmnopqrst", "' host"),
    ("Bearer ", "AbCdEfGhIjKlMnOpQr", ""),
    ("Authorization: Basic ", "dXNlcjpnZWhlaW0=", ""),
    ("Cookie: session=", "abcdefghijk", "; theme=dark"),
    ("https://hooks.slack.com/services/T0000/B0000/", made(24), ""),
    ("https://discord.com/api/webhooks/123456789012345678/", made(68), ""),
    ("https://", HEX[:32], "@o1.ingest.sentry.io/2"),
    ("redis://:", "sesamestreet", "@cache:6379/0"),
    ("postgres://app:", "opensesame", "@db.local:5432/x"),
    ("mongodb+srv://u:", "p%40ss", "@cluster0.mongodb.net/"),
    ("https://bob:", "p@sswd", "@host/x"),
    ("Server=tcp:x,1433;User ID=sa;Password=", "opensesame", ";Encrypt=True"),
    ("https://h/cb?access_token=", made(30), "&x=1"),
    ("X-Amz-Date=2024&X-Amz-Signature=", HEX[:64], ""),
    ("STRIPE_KEY=", "abcdefgh", ""),
    ('export TOKEN="', "opensesame1", '"'),
    ("SECRET: ", "abc123def456", ""),
    ("DB_PASSWORD=", "opensesame", ""),
    ('{"password": "', "opensesame", '"}'),
    ('{\\"password\\": \\"', "hunter2", '\\"}'),
    ("my api key is ", made(32), ""),
    ("my password is ", "hunter2", ", ok?"),
    ("login admin / password ", "hunter2x", ""),
    ("so ", "hunter2", " was my old password"),
    ("mysql -uroot -p", "hunter2", " shop"),
    ("curl -u admin:", "opensesame", " http://h"),
    ("deploy --password=", "opensesame", ""),
    ("<password>", "hunter2", "</password>"),
    ("**Password:** ", "hunter2", ""),
    ("login x password ", "opensesame", ""),
    ("jdbc:mysql://h/db?user=a&password=", "opensesame", ""),
    ('the passphrase is "', "correct horse battery", '"'),
    ("Mein Passwort ist ", "Sommer2024!", ""),
    ("Das Kennwort lautet ", "Geheim99", "."),
    ("mi contraseña es ", "Perro123", ""),
    ("la clave es ", "Perro123", ""),
    ("mon mot de passe est ", "Chien123", ""),
    ("Le mot de passe : « ", "Chien123", " »"),
    ("minha senha é ", "Gato1234", ""),
    ("Пароль: ", "Привет12", ""),
    ("мой пароль это ", "qwerty12", ""),
    ("密码：", "abc12345", ""),
    ("密码是", "abc12345", "，谢谢"),
    ("パスワードは", "abc12345", "です"),
    ("パスワードは「", "abc12345", "」です"),
    ("비밀번호는 ", "abc12345", " 입니다"),
    ("la mia password è ", "Gatto123", ""),
    ("moje hasło to ", "Kot12345", ""),
    ("mijn wachtwoord is ", "Hond1234", ""),
    ("-----BEGIN OPENSSH PRIVATE KEY-----\n", made(200), "\n-----END OPENSSH PRIVATE KEY-----"),
    ("-----BEGIN ENCRYPTED PRIVATE KEY-----\n", made(200), "\n-----END ENCRYPTED PRIVATE KEY-----"),
    ("-----BEGIN PGP PRIVATE KEY BLOCK-----\nVersion: GnuPG v2\n\n", made(200), ""),
    ("PuTTY-User-Key-File-3: ssh\nPrivate-Lines: 1\n", made(64), "\nPrivate-MAC: " + HEX[:64]),
    ("AGE-SECRET-KEY-1", made(58, "QPZRY9X8GF2TVDW0S3JN54KHCE6MUA7L"), ""),
]
MAILS = """\
jane＠mail.org|jane%40mail.org|ｊａｎｅ＠ｍａｉｌ．ｏｒｇ|jane@mail。org|jane[at]mail.org
jane(at)mail(dot)org|jane@xn--bcher-kva.example|ivan@почта.рф|用户@例子.中国|jane&#64;mail.org
jane\\u0040mail.org|o'neil@mail.org|jane at mail dot org|jane.doe at mail.com
jane [at] mail [dot] org|jane&#x40;mail.org|jane&commat;mail.org|jane\\x40mail.org"""
CARDS = """\
4111.1111.1111.1111|４１１１１１１１１１１１１１１１|3782.822463.10005|5555/5555/5555/4444
4111\u20111111\u20111111\u20111111|4111 – 1111 – 1111 – 1111|3782 822463 10005"""
PHONES = """\
+442079460958|0044 20 7946 0958|+49 (0)30 901820|212.769.5100|1-800-356-9377|Tel: 030 901820
téléphone: 01 42 68 53 00|móvil: 612 345 678|电话：13800138000|電話番号は03-1234-5678です
+７ 495 123 45 67|celular 11 98765-4321"""
HARMLESS_SECRETS = """\
the password is wrong; my password is not working; the password is required
password must be at least 8 characters long
password = os.environ["DB_PASSWORD"]; password=password; password: str
self.password = hash_password(password, salt)
OPENAI_API_KEY=your-api-key-here and api_key = os.environ["OPENAI_API_KEY"]
Authorization: Bearer $TOKEN, Authorization: Bearer <token>, Bearer YOUR_API_KEY
bearer token-based-authentication and the bearer of this letter
max_tokens=4096; "token": "Hello"; primary_key=user_id2; sort_key=created_at_2
the key is to practice daily, the secret is patience
commit 9a4986fc0ffee1234567890abcdef1234567890a, md5 d41d8cd98f00b204e9800998ecf8427e
550e8400-e29b-41d4-a716-446655440000, ISBN 978-3-16-148410-0, v1.2.3-beta.4+build.567
task_2024_something_else_very_long_name, key-value-store-benchmark-2024-results-table
secret_santa_gift_exchange_2024_party_list, hf_transformers_model_config_version_2
data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwAD
git@github.com:owner/repo.git, https://example.com:8080/@user/1234567890
look at example.com, see file.txt at server.local, meet me at cafe.berlin
das Passwort ist falsch, la clave es practicar, le mot de passe est incorrect, senha é obrigatória
пароль неверный, 密码错误, パスワードを忘れました, 비밀번호를 잊어버렸어요, hasło jest nieprawidłowe
call me on 2024-01-15 at 10:30; 1234 5678 9012 3456; x = 1234567890123456
""".splitlines()


@pytest.mark.parametrize(("text", "masked"), SECRETS.items())
def test_find_is_replaced_and_counted(text, masked):
    masker = Masker()
    assert masker.mask(text) == masked
    assert masker.counts.total() == 1


@pytest.mark.parametrize(
    ("before", "secret", "after"),
    [
        *(("", key.split()[0] + made(int(key.split()[1])), "") for key in re.split("[|\n]", KEYS)),
        *(
            ("", begin + HEX[: 64 if begin == "dop_v1_" else 32], "")
            for begin in KEYS_IN_HEX.split()
        ),
        *NAMED,
    ],
)
def test_no_part_of_a_secret_is_left(before, secret, after):
    for left, right in [("", ""), ("use ", "."), ("我的密钥是", "，请帮我"), ("(", ")")]:
        if before and left == "我的密钥是" and before[0].isascii():
            continue
        masked = Masker().mask(left + before + secret + after + right)
        assert not [masked for i in range(len(secret) - 5) if secret[i : i + 6] in masked]


@pytest.mark.parametrize(
    ("mask", "texts"), [("<EMAIL>", MAILS), ("<CARD>", CARDS), ("<PHONE>", PHONES)]
)
def test_personal_data_is_found_in_every_writing(mask, texts):
    masked = {text: Masker().mask(f"write {text} today") for text in re.split("[|\n]", texts)}
    assert {text: found for text, found in masked.items() if mask not in found} == {}


def test_numbers_beside_each_other_are_masked():
    two = "4111111111111111 5555555555554444"
    assert Masker().mask(two) == "<CARD> <CARD>"
    text = "IBAN DE89 3704 0044 0532 0130 00 and GB82WEST12345698765432 or 078-05-1120"
    assert Masker().mask(text) == "IBAN <IBAN> and <IBAN> or <SSN>"


@pytest.mark.parametrize("text", [*HARMLESS, *HARMLESS_SECRETS])
def test_harmless_text_stays(text):
    assert Masker().mask(text) == text


def test_masks_are_not_masked_again():
    masker = Masker()
    once = [masker.mask(text) for text in SECRETS]
    assert [masker.mask(text) for text in once] == once


def test_region_decides_about_national_phone_numbers():
    text = "Ruf an: 030 901820"
    assert Masker().mask(text) == text
    assert Masker("DE").mask(text) == "Ruf an: <PHONE>"
    with pytest.raises(ValueError, match="'Germany' but must be"):
        Masker("Germany")
