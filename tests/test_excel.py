"""Excel workbooks: read as the same table in CSV is; which sheet is read; cells that are not text."""

import datetime
import io
import json
import sys
import zipfile

import openpyxl
import pytest
from test_layouts import TWO, contents, openai, quoted, read

from jlora.common.errors import UserError
from jlora.data.readers import files


def workbook(**sheets):
    """Returns the bytes of a workbook: the name of each sheet, and its rows."""
    book = openpyxl.Workbook()
    book.remove(book.active)
    for name, rows in sheets.items():
        sheet = book.create_sheet(name)
        for row in rows:
            sheet.append(row)
    return saved(book)


def saved(book):
    content = io.BytesIO()
    book.save(content)
    return content.getvalue()


def edited(content, member, old, new):
    """Returns a workbook in which the text of one member has changed."""
    changed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as before, zipfile.ZipFile(changed, "w", zipfile.ZIP_DEFLATED) as after:
        for name in before.namelist():
            text = before.read(name)
            if name == member:
                assert old in text
                text = text.replace(old, new)
            after.writestr(name, text)
    return changed.getvalue()


ONE = ("试用期最长多久？", "依据《劳动合同法》第19条，不得超过六个月，另见“附则”。")
PAIRS = [[*ONE], [*TWO]]
HEADER = ("question", "answer")
TABLES = {
    "header": ({}, [HEADER, ONE, TWO]),
    "more columns": ({}, [("id", "问题", "答案", "source"), ("1", *ONE, "x"), ("2", *TWO, "")]),
    "capitals and spaces": ({}, [("  Question ", " ANSWER"), ONE, TWO]),
    "no header": ({}, [ONE, TWO]),
    "columns by name": ({"columns": {"prompt": "Frage", "response": "Antwort"}}, [("Frage", "Antwort"), ONE, TWO]),
    "columns by number": ({"columns": {"prompt": "2", "response": "3"}}, [("x", *ONE), ("y", *TWO)]),
    "a column without a name": ({}, [("question", "", "answer"), (ONE[0], "x", ONE[1]), (TWO[0], "", TWO[1])]),
    "turns as JSON": ({}, [("messages",), (json.dumps(openai(ONE)[0]["messages"]),)]),
    "plain text": ({"task_type": "plain-text"}, [("id", "text"), ("1", ONE[1])]),
    "an empty answer": ({}, [HEADER, ("a?", " "), ONE]),
    "unknown columns": ({}, [("Frage", "Antwort"), ("Was ist wann fällig?", "Nach Artikel 47 sofort.")]),
    "one column": ({}, [("a? b",)]),
    "twice the same name": ({}, [("question", "answer", "answer"), ("a?", "b", "c")]),
    "a mark": ({}, [("prompt", "completion", "label"), ("a?", "b", "False"), ("c?", "d", "True")]),
}


def outcome(path, reading):
    """Returns the conversations and lines, or the error, without the names of the file and its sheet."""
    try:
        rows, said = read(path, **reading)
        result = [*contents(rows), *(row.where for row in rows), *said]
    except UserError as error:
        result = [str(error)]
    return [str(each).replace("[Sheet]", "").replace(path.name, "rows") for each in result]


@pytest.mark.parametrize("table", TABLES)
def test_a_sheet_is_read_as_the_same_table_in_csv(file, table):
    reading, rows = TABLES[table]
    from_csv = outcome(file(quoted(",", *rows), "rows.csv"), reading)
    assert outcome(file(workbook(Sheet=rows), "rows.xlsx"), reading) == from_csv
    assert outcome(file(workbook(Sheet=[(), (None, None), *rows]), "rows.xlsx"), reading) == [
        line.replace("rows:3", "rows:5").replace("rows:2", "rows:4").replace("rows:1", "rows:3") for line in from_csv
    ]


def test_places_name_the_sheet_and_the_row(file):
    path = file(workbook(Laws=[HEADER, ONE, (), ("c?", None), TWO]), "laws.xlsx")
    with pytest.raises(UserError, match=r"laws.xlsx\[Laws\]:4: The answer is empty"):
        read(path)
    rows, _ = read(path, bad_rows="drop")
    assert contents(rows) == PAIRS and [row.where for row in rows] == [f"{path}[Laws]:2", f"{path}[Laws]:5"]


def test_the_content_decides_not_the_name(file):
    content = workbook(Laws=[HEADER, ONE, TWO])
    for name in ("laws.csv", "laws", "laws.jsonl"):
        assert contents(read(file(content, name))[0]) == PAIRS
    assert contents(read(file(quoted(",", HEADER, ONE, TWO), "laws.xlsx"))[0]) == PAIRS


def test_the_sheet_that_has_rows_is_read(file):
    assert contents(read(file(workbook(Sheet1=[], Sheet2=[HEADER, ONE, TWO], Sheet3=[()]), "a.xlsx"))[0]) == PAIRS
    with pytest.raises(UserError, match=r"a.xlsx: No sheet has rows"):
        read(file(workbook(Sheet1=[], Sheet2=[(), ("  ", None)]), "a.xlsx"))


def test_several_sheets_with_rows_must_be_named(file, tmp_path):
    path = file(workbook(**{"New": [HEADER, ONE], "Old, 2019#": [HEADER, TWO], "Empty": []}), "books/laws.xlsx")
    with pytest.raises(UserError, match=r"laws.xlsx: 2 sheets have rows: 'New', 'Old, 2019#'. .* as in laws.xlsx#New"):
        read(path)
    assert contents(read(f"{path}#New")[0]) == [[*ONE]] and contents(read(f"{path}#*")[0]) == PAIRS
    rows, _ = read(f"{path.parent}#New")  # of every workbook in a directory
    assert contents(rows) == [[*ONE]] and rows[0].where == f"{path}[New]:2"
    with pytest.raises(UserError, match=r"laws.xlsx has no sheet 'new'. Its sheets: 'New', 'Old, 2019#', 'Empty'"):
        read(f"{path}#new")
    with pytest.raises(UserError, match=r"laws.xlsx\[Empty\]: The table contains no rows"):
        read(f"{path}#Empty")
    hashes = {files.hash_files(f"{path}{sheet}", "train_data_dir") for sheet in ("", "#New", "#*")}
    assert len(hashes) == 3 and files.resolved_path(f"{path}#New", "k") == f"{path.resolve()}#New"
    with pytest.raises(UserError, match=r"train_data_dir=.*a.csv#New: Only Excel workbooks have sheets. Remove #New"):
        read(f"{file('question,answer', 'a.csv')}#New")
    with pytest.raises(UserError, match=r"none.xlsx#New: No such file"):
        read(tmp_path / "none.xlsx#New")
    path = file(quoted(",", HEADER, ONE, TWO), "laws#2.csv")  # a file that is called so
    assert contents(read(path)[0]) == PAIRS


def test_hidden_sheets_are_read_only_by_name(file):
    book = openpyxl.load_workbook(io.BytesIO(workbook(Laws=[HEADER, ONE], Draft=[HEADER, TWO], Lists=[])))
    book["Draft"].sheet_state = "hidden"
    path = file(saved(book), "laws.xlsx")
    rows, said = read(path)
    assert contents(rows) == contents(read(f"{path}#*")[0]) == [[*ONE]]
    assert said == ["train_data_dir: hidden sheets, not read (to read one, add #NAME to the path): laws.xlsx[Draft]"]
    assert contents(read(f"{path}#Draft")[0]) == [[*TWO]]
    book["Draft"].sheet_state, book["Laws"].sheet_state, book["Lists"].title = "visible", "hidden", "Other"
    book.remove(book["Draft"])
    with pytest.raises(UserError, match=r"No visible sheet has rows. Add #Laws to the path to read its hidden sheet"):
        read(file(saved(book), "laws.xlsx"))


def test_line_breaks_in_cells_stay(file):
    rows = [("\nQuestion\n", "answer"), ("\n\nWhat\nis due?", "First.\n\n- Then.")]
    rows.append(("a?", "_x000D_\nOne_x000D_\nTwo\r\nThree"))  # as programs write that use Windows' line breaks
    assert contents(read(file(workbook(Laws=rows), "laws.xlsx"))[0]) == [
        ["What\nis due?", "First.\n\n- Then."],
        ["a?", "One\nTwo\nThree"],
    ]


def test_shared_strings_are_read(file):
    """As Excel writes text: once for all cells, with the fonts of its parts, and with how it is pronounced."""
    strings = "".join(
        f"<si>{text}</si>"
        for text in (
            "<t>question</t>",
            "<t>answer</t>",
            '<r><rPr><b/></rPr><t xml:space="preserve">What </t></r><r><t>is due?</t></r>',
            "<t>\nOne&amp;two.\nThree.</t><rPh sb='0' eb='1'><t>wan</t></rPh>",
        )
    )
    content = workbook(Laws=[("s0", "s1"), ("s2", "s3")])
    for number in range(4):
        before = f't="inlineStr"><is><t>s{number}</t></is>'.encode()
        content = edited(content, "xl/worksheets/sheet1.xml", before, f't="s"><v>{number}</v>'.encode())
    kind = "application/vnd.openxmlformats-officedocument.spreadsheetml.sharedStrings+xml"
    part = f'<Override PartName="/xl/sharedStrings.xml" ContentType="{kind}"/></Types>'
    path = file(edited(content, "[Content_Types].xml", b"</Types>", part.encode()), "laws.xlsx")
    with zipfile.ZipFile(path, "a") as archive:
        main = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
        archive.writestr("xl/sharedStrings.xml", f'<sst xmlns="{main}">{strings}</sst>')
    assert contents(read(path)[0]) == [["What is due?", "One&two.\nThree."]]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (42, "42"),
        (12.5, "12.5"),
        (0.1 + 0.2, "0.3"),
        (0.035, "0.035"),
        (True, "TRUE"),
        (datetime.datetime(2024, 1, 31), "2024-01-31"),
        (datetime.datetime(2024, 1, 31, 9, 30), "2024-01-31 09:30:00"),
        (datetime.time(9, 30), "09:30:00"),
        ("007", "007"),
    ],
)
def test_cells_that_are_not_text(file, value, text):
    rows, said = read(file(workbook(Laws=[HEADER, ("How much?", value)]), "laws.xlsx"))
    assert contents(rows) == [["How much?", text]]
    formatted = isinstance(value, float | datetime.datetime | datetime.time)
    assert said == formatted * [
        "train_data_dir: rows with numbers and dates, read without their format, as 0.035 and 2024-01-31: Laws"
    ]


def test_cells_beyond_the_header_are_reported(file):
    rows, said = read(file(workbook(Laws=[HEADER, ONE, (*TWO, None, "a remark")]), "laws.xlsx"))
    assert contents(rows) == PAIRS and said == ["train_data_dir: unused columns: column 4"]


def test_formulas_are_read_by_their_results(file):
    content = workbook(Laws=[HEADER, ("a?", "=A2"), ("b?", '=IF(A2="a?","","x")'), ("c?", "d")])
    path = file(content, "laws.xlsx")
    with pytest.raises(UserError) as caught:
        read(path)
    reason = "Expected text in 'answer', got a formula without its result (save the file in Excel)"
    assert f"{path}[Laws]:2: {reason}. Also at {path}[Laws]:3." in str(caught.value)
    member = "xl/worksheets/sheet1.xml"
    content = edited(content, member, b"<f>A2</f><v></v>", b"<f>A2</f><v>seven</v>")
    content = edited(content, member, b'<c r="B2">', b'<c r="B2" t="str">')
    content = edited(content, member, b'<c r="B3">', b'<c r="B3" t="str">')
    with pytest.raises(UserError, match=r"laws.xlsx\[Laws\]:3: The answer is empty"):  # as its result is
        read(file(content, "laws.xlsx"))
    assert contents(read(file(content, "laws.xlsx"), bad_rows="drop")[0]) == [["a?", "seven"], ["c?", "d"]]
    unused = workbook(Laws=[("question", "answer", "length"), (*ONE, "=LEN(B2)"), (*TWO, None)])
    rows, said = read(file(unused, "laws.xlsx"))
    assert contents(rows) == PAIRS and said == ["train_data_dir: unused columns: length"]


def test_error_values_are_reported_where_they_are_needed(file):
    rows = [("question", "answer", "found"), (*ONE, "#N/A"), ("c?", "#REF!", ""), TWO]
    path = file(workbook(Laws=rows), "laws.xlsx")
    with pytest.raises(UserError, match=r"laws.xlsx\[Laws\]:3: Expected text in 'answer', got Excel's error #REF!"):
        read(path)
    assert contents(read(path, bad_rows="drop")[0]) == PAIRS


def test_merged_cells_have_their_text_in_the_first_row(file):
    book = openpyxl.load_workbook(io.BytesIO(workbook(Laws=[HEADER, ONE, (None, TWO[1])])))
    book["Laws"].merge_cells("A2:A3")
    with pytest.raises(UserError, match=r"laws.xlsx\[Laws\]:3: The question is empty"):
        read(file(saved(book), "laws.xlsx"))


def test_rows_beyond_the_stated_size_of_a_sheet_are_read(file):
    content = workbook(Laws=[HEADER, ONE, TWO])
    wrong = edited(content, "xl/worksheets/sheet1.xml", b'<dimension ref="A1:B3"/>', b'<dimension ref="A1"/>')
    assert contents(read(file(wrong, "laws.xlsx"))[0]) == PAIRS


def test_broken_workbooks_are_refused(file):
    content = workbook(Laws=[HEADER, ONE, TWO])
    sheet = "xl/worksheets/sheet1.xml"
    for broken in (
        edited(content, sheet, b"</sheetData>", b""),
        edited(content, sheet, b'r="A2"', b'r="ZZZZZZ2"'),
        edited(content, sheet, b't="inlineStr"><is><t>question</t></is>', b't="s"><v>99</v>'),
        edited(content, "xl/workbook.xml", b"<sheets>", b"<nothing>"),
    ):
        with pytest.raises(UserError, match=r"laws.xlsx cannot be read as an Excel workbook: .*save the table as CSV"):
            read(file(broken, "laws.xlsx"))
    far = edited(content, sheet, b'<row r="3"', b'<row r="99999999999999"')
    assert contents(read(file(far, "laws.xlsx"))[0]) == [[*ONE]]  # no sheet has more than 2^20 rows


def test_without_openpyxl_the_message_names_it(file, monkeypatch):
    path = file(workbook(Laws=[HEADER, ONE]), "laws.xlsx")
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    with pytest.raises(UserError, match=r"laws.xlsx is an Excel workbook. Run `pip install openpyxl`.*table as CSV"):
        read(path)
