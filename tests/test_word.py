"""Word documents: tables, lines with roles, and headings that ask; unclear documents are refused."""

import io
import sys

import docx
import pytest
from docx.oxml import parse_xml
from docx.oxml.ns import nsdecls
from test_excel import HEADER, ONE, PAIRS, TWO, edited
from test_layouts import contents, read

from jlora.common.errors import UserError


def document(*blocks):
    """Returns the bytes of a document of texts, (style, text) such as ("Heading 1", "Why?"), and tables as lists."""
    made = docx.Document()
    for block in blocks:
        if isinstance(block, list):
            table = made.add_table(len(block), len(block[0]))
            for row, texts in zip(table.rows, block, strict=True):
                for cell, text in zip(row.cells, texts, strict=True):
                    cell.text = text
        elif isinstance(block, tuple) and block[0] == "bold":
            made.add_paragraph().add_run(block[1]).bold = True
        else:
            style, text = block if isinstance(block, tuple) else (None, block)
            made.add_paragraph(text, style)
    return saved(made)


def saved(made):
    content = io.BytesIO()
    made.save(content)
    return content.getvalue()


TABLE = [HEADER, ONE, TWO]
ASKED = [("Heading 2", "How long?"), "Two weeks.", "", "See annex.", ("Heading 2", "When？"), "In May."]
TURNS = ["Q: a?", "A: b", "Q: c?", "A: d", "", "Q: e?", "A: f"]
SAID = [["How long?", "Two weeks.\n\nSee annex."], ["When？", "In May."]]
FORMS = {
    "a table": ([TABLE], PAIRS),
    "a table in Chinese": ([[("编号", "问题", "答案"), ("1", *ONE), ("2", *TWO)]], PAIRS),
    "two columns without a header": ([[ONE, TWO]], PAIRS),
    "two tables": ([TABLE, "And:", [HEADER, TWO]], [*PAIRS, [*TWO]]),
    "lines with roles": (["Q: How long?", "A: Two weeks.", "", "See annex.", "Q: When？", "A: In May."], SAID),
    "roles in Chinese": (["问：How long?", "答：Two weeks.\n\nSee annex.", "问：When？", "答：In May."], SAID),
    "line breaks in paragraphs": (["Q: How long?\nA: Two weeks.\n\nSee annex.", "Q: When？\nA: In May."], SAID),
    "turns between blank lines": (TURNS, [["a?", "b", "c?", "d"], ["e?", "f"]]),
    "headings": (ASKED, SAID),
    "bold questions": ([("bold", text[1]) if isinstance(text, tuple) else text for text in ASKED], SAID),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_are_read(file, form):
    blocks, expected = FORMS[form]
    assert contents(read(file(document(*blocks), "laws.docx"))[0]) == expected
    rows, said = read(file(document(("Title", "Staff FAQ"), "As of May", *blocks), "laws"))  # known by its content
    assert contents(rows) == expected
    assert "train_data_dir: lines outside of questions and answers, not read: laws" in " ".join(said)


def test_places_name_the_table_and_row_or_the_paragraph(file):
    tables = [("version", "date"), ("1", "May")], [HEADER, ONE, ("", ""), TWO]
    path = file(document(("Title", "FAQ"), *tables), "laws.docx")
    rows, said = read(path)
    assert [row.where for row in rows] == [f"{path}[table 2]:2", f"{path}[table 2]:4"]
    assert "tables without questions and answers, not read: laws.docx[table 1]" in said[1]
    path = file(document("FAQ", *ASKED), "laws.docx")
    assert [row.where for row in read(path)[0]] == [f"{path}[paragraphs]:2", f"{path}[paragraphs]:6"]
    path = file(document("FAQ", "Q: a?\nA:", "Q: c?", "A: d"), "laws.docx")
    with pytest.raises(UserError, match=r"laws.docx\[paragraphs\]:2: The answer is empty"):
        read(path)
    path = file(document(*ASKED, ("Heading 2", "Why?"), ("Heading 2", "Who?"), "Ann."), "laws.docx")
    with pytest.raises(UserError, match=r"laws.docx\[paragraphs\]:7: This question has no answer: 'Why\?'"):
        read(path)


def test_headings_that_do_not_ask_end_an_answer_unless_they_are_below_its_question(file):
    blocks = [("Heading 1", "Leave"), *ASKED, ("Heading 3", "Exceptions"), "None.", ("Heading 1", "Pay"), "About pay."]
    rows, said = read(file(document(*blocks), "laws.docx"))
    assert contents(rows) == [SAID[0], ["When？", "In May.\nExceptions\nNone."]]
    assert said == ["train_data_dir: lines outside of questions and answers, not read: laws.docx (3)"]
    blocks = ["Q: a?", "A: b", ("Heading 1", "Pay"), "Q: c?", "A: d", ("Heading 1", "Q: e?"), "A: f"]
    rows, said = read(file(document(*blocks), "laws.docx"))
    assert contents(rows) == [["a?", "b"], ["c?", "d"], ["e?", "f"]]
    assert "train_data_dir: lines outside of questions and answers, not read: laws.docx" in said


def test_bold_lines_ask_only_if_no_heading_does(file):
    rows, said = read(file(document(*ASKED, ("bold", "Really?"), "Yes."), "laws.docx"))
    assert contents(rows) == [SAID[0], ["When？", "In May.\nReally?\nYes."]] and not said
    rows, said = read(file(document(("bold", "How long?"), "Two weeks.", ("bold", "Note"), "x?"), "laws.docx"))
    assert contents(rows) == [["How long?", "Two weeks.\nNote\nx?"]]
    assert said == ["train_data_dir: bold lines that end in a question mark are read as questions: laws.docx"]


def test_styles_based_on_headings_are_headings(file):
    made = docx.Document()
    made.styles.add_style("Frage", 1).base_style = made.styles["Heading 2"]
    for text, style in (("How long?", "Frage"), ("Two weeks.", None)):
        made.add_paragraph(text, style)
    assert contents(read(file(saved(made), "laws.docx"))[0]) == [["How long?", "Two weeks."]]


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        (["Leave is granted.", "Pay is due."], r"Found no questions and answers\. .*task_type=plain-text"),
        (["Who knows?", "Nobody."], "Found no questions and answers"),
        ([""], "Found no questions and answers"),
        (["Text."] * 5 + [[("Author", "Ann"), ("Date", "May")]], "Found no questions and answers"),
        ([[("Author", "Ann"), ("Date", "May")], [("Name", "Role"), ("Bob", "Clerk")]], "Found no questions"),
        ([[("Name", "Role", "Since"), ("Bob", "Clerk", "May")]], r"\[table 1\]: Cannot tell which columns .*: Name"),
        ([TABLE, *ASKED], r"Both table 1 and the text have questions \('How long\?'\)\. Split the document"),
        ([*ASKED, [("From", "To"), ("May", "June")]], r"Table 1 is among the answers, .* Write it as text, or move it"),
        (["Worker: a?", "Counsel: b"], "Found no questions and answers"),
        (["Client: a?", "Firm: b"], "Cannot tell which prefixes are the roles"),
    ],
    ids=str,
)
def test_unclear_documents_are_refused(file, blocks, message):
    with pytest.raises(UserError, match=f"laws.docx.*{message}"):
        read(file(document(*blocks), "laws.docx"))


def test_settings_name_roles_columns_and_plain_text(file):
    path = file(document("Worker: a?", "Counsel: b"), "laws.docx")
    assert contents(read(path, role_prefixes={"user": "Worker", "assistant": "Counsel"})[0]) == [["a?", "b"]]
    path = file(document("Text.", [("Frage", "Antwort"), ("a?", "b")]), "laws.docx")
    assert contents(read(path, columns={"prompt": "Frage", "response": "Antwort"})[0]) == [["a?", "b"]]
    path = file(document([("x", "a?", "b"), ("y", "c?", "d")]), "laws.docx")
    assert contents(read(path, columns={"prompt": "2", "response": "3"})[0]) == [["a?", "b"], ["c?", "d"]]
    path = file(document("One\ntwo.", "", [HEADER, ONE], "Q: three"), "laws.docx")
    rows, said = read(path, task_type="plain-text")
    assert contents(rows) == [["One\ntwo."], ["Q: three"]] and rows[1].where == f"{path}[paragraphs]:3"
    assert said == ["train_data_dir: tables, not read as plain text: laws.docx[table 1]"]


def test_merged_cells(file):
    made = docx.Document(io.BytesIO(document([HEADER, ("a?", "b"), ("", "c"), ("", ""), ("d?", "e")])))
    table = made.tables[0]
    table.cell(1, 0).merge(table.cell(2, 0))  # one question, two answers
    table.cell(3, 0).merge(table.cell(3, 1)).text = "Section"
    path = file(saved(made), "laws.docx")
    with pytest.raises(UserError, match=r"laws.docx\[table 1\]:4: The answer is empty"):
        read(path)
    assert contents(read(path, bad_rows="drop")[0]) == [["a?", "b"], ["a?", "c"], ["d?", "e"]]


def test_tables_in_cells_are_reported(file):
    made = docx.Document(io.BytesIO(document(TABLE)))
    made.tables[0].cell(2, 1).add_table(1, 1)
    with pytest.raises(UserError, match=r"laws.docx\[table 1\]:3: Expected text in 'answer', got a table in a cell"):
        read(file(saved(made), "laws.docx"))


def test_links_fields_and_breaks_are_text_and_boxes_are_not(file):
    made = docx.Document(io.BytesIO(document(("Heading 1", "How long?"), "See ")))
    word = nsdecls("w")
    for text in (
        f"<w:hyperlink {word}><w:r><w:t>the annex</w:t><w:br/><w:t>of </w:t></w:r></w:hyperlink>",
        f"<w:fldSimple {word} w:instr='DATE'><w:r><w:t>May</w:t><w:tab/></w:r></w:fldSimple>",
        f"<w:r {word}><w:pict><w:txbxContent><w:p><w:r><w:t>Box</w:t></w:r></w:p></w:txbxContent></w:pict></w:r>",
    ):
        made.paragraphs[1]._p.append(parse_xml(text))
    rows, said = read(file(saved(made), "laws.docx"))
    assert contents(rows) == [["How long?", "See the annex\nof May"]]
    assert said == ["train_data_dir: text in boxes, forms or tables of contents, not read: laws.docx"]


def test_tracked_changes_are_refused(file):
    content = document("Q: a?", "A: b")
    deleted = edited(content, "word/document.xml", b"<w:t>A: b</w:t>", b"<w:t>A: b</w:t></w:r><w:del/><w:r>")
    with pytest.raises(UserError, match=r"laws.docx has tracked changes. Accept or reject them in Word, and save it"):
        read(file(deleted, "laws.docx"))


def test_broken_documents_are_refused(file):
    content = document("Q: a?", "A: b")
    for old, new in ((b"</w:body>", b""), (b"<w:body>", b"<body>")):
        with pytest.raises(UserError, match=r"laws.docx cannot be read as a Word document: .*save its text as .txt"):
            read(file(edited(content, "word/document.xml", old, new), "laws.docx"))


def test_without_python_docx_the_message_names_it(file, monkeypatch):
    path = file(document(*ASKED), "laws.docx")
    monkeypatch.setitem(sys.modules, "docx", None)
    with pytest.raises(UserError, match=r"laws.docx is a Word document. Run `pip install python-docx`.*as .txt"):
        read(path)
