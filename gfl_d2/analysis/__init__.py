from .analysis import Analysis, analyze
from .picture import save_picture
from .report import format_report
