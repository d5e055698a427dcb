"""The guess at an encoding turns the bytes back into the text."""

from __future__ import annotations

import codecs

import pytest

from eabf_cli.core.documents.encodings import guess_encoding

GERMAN = "Die Größe des Gebäudes überraschte die Gäste, und für fünf Nächte blieben sie in München."
FRENCH = "Où est passé le garçon qui préférait les pâtes à la crème ? Il a été aperçu près de la forêt."
POLISH = "Zażółć gęślą jaźń. Wczoraj wieczorem pojechaliśmy do Łodzi, żeby zjeść świeże pączki."
RUSSIAN = "Вчера вечером мы поехали за город, чтобы увидеть родных и поесть свежих пирожков."
JAPANESE = "昨日の夕方、私たちは家族に会うために町の外へ行き、美味しい料理を食べました。"
TEXTS = [
    ("cp1252", GERMAN),
    ("latin-1", GERMAN),
    ("cp1252", "Käse und Grüße aus München."),
    ("latin-1", FRENCH),
    ("latin-1", "¿Dónde está el niño? Mañana irá al jardín con su corazón lleno de emoción."),
    ("cp1252", "A informação não está disponível, mas amanhã você poderá ler a edição em português."),
    ("cp1252", "Kräftskivan på ön är ett nöje för små och stora; båten går över fjärden på kvällen."),
    ("cp1252", "“It’s not the café,” she said — “it’s the naïve prices: €5.”"),
    ("cp1250", POLISH),
    ("iso8859-2", POLISH),
    ("cp1250", "Příliš žluťoučký kůň úpěl ďábelské ódy. Večer jsme šli přes řeku k našim přátelům."),
    ("cp1250", "Az őszi erdőben a gyerekek színes leveleket gyűjtöttek, és a nagymama süteményt készített."),
    ("cp1251", RUSSIAN),
    ("koi8-r", RUSSIAN),
    ("cp866", RUSSIAN),
    *[
        (encoding, text)
        for encoding in ("cp1251", "koi8-r")
        for text in (
            "Это русский текст в старой кодировке.",
            "ВСЕ СЧАСТЛИВЫЕ СЕМЬИ ПОХОЖИ ДРУГ НА ДРУГА.",
        )
    ],
    ("cp1251", "Їхній під'їзд був зачинений, тому ми пішли до сусідів, щоб зателефонувати."),
    ("cp1253", "Χθες το βράδυ πήγαμε έξω από την πόλη για να δούμε τους συγγενείς μας και να φάμε."),
    ("cp1254", "Dün akşam şehir dışına çıktık, çocuklarla oynadık ve güneşin batışını izledik."),
    ("cp1255", "אתמול בערב נסענו אל מחוץ לעיר כדי לראות את המשפחה ולאכול ארוחה טובה."),
    ("cp1256", "ذهبنا مساء أمس إلى خارج المدينة لرؤية العائلة وتناول الطعام معا في الحديقة."),
    ("shift_jis", JAPANESE),
    ("euc-jp", JAPANESE),
    ("gb18030", "昨天晚上我们去城外看望家人,一起吃了新鲜的饺子,大家都很高兴。"),
    ("big5", "昨天晚上我們去城外看望家人,一起吃了新鮮的餃子,大家都很高興。"),
    ("euc-kr", "어제 저녁 우리는 가족을 만나기 위해 도시 밖으로 나가 맛있는 음식을 먹었습니다."),
    ("cp850", GERMAN),
    ("mac-roman", GERMAN),
    ("mac-roman", FRENCH),
]


@pytest.mark.parametrize("repeated", [1, 30])
@pytest.mark.parametrize(("encoding", "text"), TEXTS, ids=[f"{encoding}-{text[:8]}" for encoding, text in TEXTS])
def test_the_guess_reads_the_text_as_it_was_written(encoding: str, text: str, repeated: int) -> None:
    written = f"{text}\n" * repeated
    guessed = guess_encoding(written.encode(encoding))
    assert guessed is not None
    assert written.encode(encoding).decode(guessed) == written


@pytest.mark.parametrize("text", [GERMAN, FRENCH])
def test_western_text_is_called_by_its_usual_name(text: str) -> None:
    assert guess_encoding(text.encode("cp1252")) == "CP1252"


def test_every_name_is_one_that_python_has_too() -> None:
    for encoding, text in TEXTS:
        codecs.lookup(str(guess_encoding(text.encode(encoding))))
